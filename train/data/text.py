"""Bytes to learn a language model from: files, or sentences of a small grammar made in code.

The grammar has what a byte model can learn in minutes and what tells arithmetics apart: spelling,
agreement in number over a distance, and sums of two-digit numbers.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer

_NOUNS = "engineer sailor teacher painter robot farmer doctor writer pilot singer".split()
_THINGS = "letter engine garden table river window bridge number ticket signal".split()
_VERBS = "read build watch follow paint repair carry measure count answer".split()
_PLACES = "near the harbour|behind the old mill|in the north|by the river|under the bridge".split(
    "|"
)
_ADJECTIVES = "quiet old small careful clever young patient busy tall honest".split()
HELD_OUT = 0.1
"""Share at the end of the text that is never trained on."""


def grammar_text(size: int = 400_000, seed: int = 0) -> bytes:
    """`size` bytes of sentences, the same for the same seed."""
    rng = np.random.default_rng(seed)

    def pick(words):
        return words[rng.integers(len(words))]

    parts, length = [], 0
    while length < size:
        if rng.random() < 0.25:
            a, b = rng.integers(10, 50, 2)
            sentence = f"{a} and {b} make {a + b}.\n"
        else:
            several = rng.random() < 0.5
            noun, verb = pick(_NOUNS), pick(_VERBS)
            subject = f"the {pick(_ADJECTIVES)} {noun}{'s' if several else ''} {pick(_PLACES)}"
            sentence = f"{subject} {verb}{'' if several else 's'} the {pick(_THINGS)}.\n"
        parts.append(sentence)
        length += len(sentence)
    return "".join(parts).encode()[:size]


def read_text(files: Sequence[Path]) -> bytes:
    """All files, one after the other.

    Raises: ValueError: a file cannot be read; names it.
    """
    parts = []
    for file in files:
        try:
            parts.append(file.read_bytes())
        except OSError as error:
            raise ValueError(f"--text {file}: cannot be read ({error.strerror})") from None
    return b"".join(parts)


class Windows:
    """Windows of `length + 1` tokens, bytes among them: batch n of training for any n, and the
    held-out ones.

    Raises: ValueError: fewer tokens than ten windows.
    """

    def __init__(self, text: bytes | np.ndarray, length: int, seed: int = 0):
        held = int(len(text) * HELD_OUT)
        if held < length + 1:
            unit = "bytes" if isinstance(text, bytes) else "tokens"
            raise ValueError(
                f"the text has {len(text)} {unit}; windows of {length + 1} with a tenth held out "
                f"need {10 * (length + 1) + 10}"
            )
        data = np.frombuffer(text, np.uint8) if isinstance(text, bytes) else text
        self.train: Integer[np.ndarray, " tokens"] = data[:-held]
        self.test: Integer[np.ndarray, " tokens"] = data[-held:]
        self.length, self.seed = length, seed

    def batch(
        self, step: int, count: int, rows: slice = slice(None)
    ) -> Int32[np.ndarray, "rows length+1"]:
        """Windows of step `step`: they depend on it and the seed alone. Of `count`, only some rows
        may be asked for."""
        rng = np.random.default_rng((self.seed, step))
        starts = rng.integers(0, len(self.train) - self.length, count)
        return self._at(self.train, starts[rows])

    def held_out(self, count: int) -> Int32[np.ndarray, "count length+1"]:
        """Windows spread evenly over the held-out part."""
        last = len(self.test) - self.length - 1
        return self._at(self.test, np.linspace(0, last, count).astype(int))

    def _at(self, data, starts):
        return data[starts[:, None] + np.arange(self.length + 1)].astype(np.int32)
