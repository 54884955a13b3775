"""From logits to text: the likeliest path, a beam of prefixes, or a beam with a language model.

    score = ln p(labels | x) + weight * ln p_LM(words) + bonus * number of words

The last is shallow fusion with an n-gram model that KenLM reads (Hannun et al., 2014), by the
library `ctc-beam-decoder`, an extra: `pip install "cmjax[decoding]"`.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from cmjax.models.asr.ctc import greedy_decode, prefix_beam_decode
from cmjax.models.asr.text import Alphabet

Decoder = Callable[[Float[Array, "batch frames labels"], Int[Array, "batch"]], list[str]]
"""(logits, frames of each) -> texts."""

_LEAST = -12.0  # ln of the probability below which a label does not extend a prefix
_LANGUAGE_BEAM = 64
_WORD = "▁"  # how the library tells labels that begin a word


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is found."""

    beam: int = 0
    """Prefixes of the beam search; 0 takes the most likely path, or 64 with a language model."""
    language_model: Path | None = None
    """n-gram model to search with: an ARPA file, or KenLM's binary of one."""
    language_weight: float = 0.5
    """Weight of the language model's logarithm of the probability."""
    word_bonus: float = 1.5
    """Added for every word, which a language model alone makes too few of."""

    def __post_init__(self):
        if self.beam < 0:
            raise ValueError(f"--beam must not be negative, got {self.beam}")
        for name in ("language_weight", "word_bonus"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name == "language_weight" and value < 0):
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be finite (a weight not negative), got {value}")


def make_decoder(alphabet: Alphabet, options: Decoding) -> Decoder:
    """How labels of `alphabet` become text.

    Raises:
      ValueError: a language model that cannot be read, or without the library for one.
    Example: two frames of "b", by the likeliest path.

      >>> import jax.numpy as jnp
      >>> decode = make_decoder(Alphabet("characters", ("a", "b")), Decoding())
      >>> decode(jnp.array([[[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]]]), jnp.array([2]))
      ['b']
    """
    if options.language_model is not None:
        return _with_language(alphabet, options, options.language_model)
    if not options.beam:
        return lambda logits, frames: [
            alphabet.decode(own) for own in greedy_decode(logits, frames)
        ]

    def search(logits, frames):
        return [
            alphabet.decode(prefix_beam_decode(own, beam=options.beam, least=_LEAST)[0][0])
            for own in _each(logits, frames)
        ]

    return search


def _with_language(alphabet: Alphabet, options: Decoding, path: Path) -> Decoder:
    try:
        from ctc_beam_decoder import build_ctcdecoder  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            '--language-model needs the library ctc-beam-decoder: pip install "cmjax[decoding]"'
        ) from None
    words = alphabet.units == "words"
    symbols = [_WORD + symbol if words else symbol for symbol in alphabet.symbols]
    if not path.is_file():
        raise ValueError(f"--language-model: no file {path}")
    try:
        with _quiet():
            library = build_ctcdecoder(
                ["", *symbols],
                kenlm_model_path=str(path),
                alpha=options.language_weight,
                beta=options.word_bonus,
            )
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"--language-model {path} cannot be read: {error}") from None
    beam = options.beam or _LANGUAGE_BEAM

    def search(logits, frames):
        found = (
            library.decode_beams(own, beam_width=beam, token_min_logp=_LEAST)
            for own in _each(logits, frames)
        )
        return [" ".join(beams[0][0].split()) if beams else "" for beams in found]

    return search


def _each(logits, frames) -> Iterator[Float[np.ndarray, "frames labels"]]:
    """Log-probabilities of every utterance."""
    scores = np.asarray(jax.nn.log_softmax(logits))
    for own, count in zip(scores, np.asarray(frames), strict=True):
        yield own[:count]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """KenLM draws its progress on standard error, from C++."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
