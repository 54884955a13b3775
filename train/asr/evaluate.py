"""Test a network: error rates and real-time factor on every test set of a corpus."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from cmjax.models.asr.decoding import Decoder
from cmjax.models.asr.score import ErrorRate, character_error_rate, word_error_rate
from train.data.audio import Utterance
from train.data.batches import Framing, test_batches


@dataclasses.dataclass(frozen=True)
class Result:
    """What a network does on a test set.

    Attributes:
      words, characters: error rates.
      seconds: of speech.
      compute_s: time it took, without compiling.
      wrong: (name, reference, hypothesis) of utterances that are not exact.
    """

    words: ErrorRate
    characters: ErrorRate
    seconds: float
    compute_s: float
    wrong: tuple[tuple[str, str, str], ...]

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "wer": self.words.rate,
            "cer": self.characters.rate,
            "exact": self.words.exact,
            "substitutions": self.words.substitutions,
            "deletions": self.words.deletions,
            "insertions": self.words.insertions,
            "words": self.words.length,
            "utterances": self.words.utterances,
            "seconds": self.seconds,
            "compute_s": self.compute_s,
        }


def evaluate(
    call: Callable,
    utterances: Sequence[Utterance],
    framing: Framing,
    decode: Decoder,
    *,
    batch: int,
    rate: int,
) -> Result:
    """Recognise utterances and count the errors; `call` is a network's `whole_call`."""
    heard = [""] * len(utterances)
    compiled: set[tuple[int, ...]] = set()
    compute_s = 0.0
    for indices, rows in test_batches(utterances, framing, batch, rate):
        if rows.samples.shape not in compiled:
            compiled.add(rows.samples.shape)
            jax.block_until_ready(call(rows.samples, rows.lengths))
        start = time.perf_counter()
        logits, frames = jax.block_until_ready(call(rows.samples, rows.lengths))
        compute_s += time.perf_counter() - start
        for index, text in zip(indices, decode(logits, frames), strict=False):
            heard[index] = text
    said = [utterance.text for utterance in utterances]
    return Result(
        words=word_error_rate(said, heard),
        characters=character_error_rate(said, heard),
        seconds=sum(len(utterance.samples) for utterance in utterances) / rate,
        compute_s=compute_s,
        wrong=tuple(
            (utterance.name, utterance.text, text)
            for utterance, text in zip(utterances, heard, strict=True)
            if utterance.text != text
        ),
    )
