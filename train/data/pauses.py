"""Words cut out of an utterance at its pauses, where there are as many pieces as words.

    speech    frames whose level lies above floor + share (top - floor), in decibels
    pieces    runs of speech with less than `gap` of silence inside

Shares and gaps are tried until the pieces are as many as the words of the transcript; cuts lie in
the middle of the silences, at the median over all trials that agree, so that a word keeps the
background it was spoken in. From a handful of long recordings this makes many short ones, of which
new strings can be joined: without them CTC learns when eight words come, and not which.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float, Int16

from train.data.audio import Utterance
from train.data.corpus import Corpus

_FRAME_S = 0.01
_SHARES = (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)
_GAPS_S = (0.06, 0.08, 0.1, 0.12, 0.15)
_SHORTEST_S = 0.08  # a piece that is shorter is a click
_MOST_EDGE_S = 0.2  # silence kept before the first and behind the last word
_AGREE = 3  # trials that must find as many pieces as there are words


def with_cut_words(corpus: Corpus) -> Corpus:
    """A corpus whose training utterances are there twice: whole, and cut into single words.

    Utterances of one word, or without a pause between every two words, are there once. Strings are
    then joined of the single words (`Corpus.joinable`).
    """
    words = [word for u in corpus.train for word in cut_at_pauses(u, corpus.rate)]
    return dataclasses.replace(
        corpus, train=(*corpus.train, *words), joinable=corpus.joinable or bool(words)
    )


def cut_at_pauses(utterance: Utterance, rate: int) -> list[Utterance]:
    """The words of an utterance, or none if its pauses do not tell them apart.

    Args:
      utterance: of two words or more.
      rate: samples per second.
    """
    texts = utterance.text.split()
    step = round(_FRAME_S * rate)
    if len(texts) < 2 or len(utterance.samples) < 2 * step * len(texts):
        return []
    level = _level_db(utterance.samples, step)
    floor, top = np.percentile(level, (10, 95))
    found = []
    for share, gap in itertools.product(_SHARES, _GAPS_S):
        pieces = _pieces(level > floor + share * (top - floor), round(gap / _FRAME_S))
        if len(pieces) == len(texts):
            edge = round(_MOST_EDGE_S / _FRAME_S)
            inner = [(a + b) / 2 for (_, a), (b, _) in itertools.pairwise(pieces)]
            found.append([pieces[0][0] - edge, *inner, pieces[-1][1] + edge])
    if len(found) < _AGREE:
        return []
    cuts = np.clip(np.rint(np.median(found, axis=0)), 0, len(level)).astype(int) * step
    return [
        Utterance(f"{utterance.name}[{i}]", utterance.speaker, text, utterance.samples[a:b])
        for i, (text, (a, b)) in enumerate(zip(texts, itertools.pairwise(cuts), strict=True))
    ]


def _level_db(samples: Int16[np.ndarray, "time"], step: int) -> Float[np.ndarray, "frames"]:
    frames = samples[: len(samples) // step * step].reshape(-1, step).astype(np.float64)
    return 10 * np.log10(np.square(frames).mean(axis=1) + 1.0)


def _pieces(speech: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """(first, behind the last) frame of every run of speech; shorter silences do not end one."""
    edges = np.flatnonzero(np.diff(speech.astype(int), prepend=0, append=0))
    joined: list[tuple[int, int]] = []
    for first, behind in edges.reshape(-1, 2).tolist():
        if joined and first - joined[-1][1] < gap:
            joined[-1] = (joined[-1][0], behind)
        else:
            joined.append((first, behind))
    shortest = round(_SHORTEST_S / _FRAME_S)
    return [(first, behind) for first, behind in joined if behind - first >= shortest]
