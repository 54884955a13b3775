"""Strings of words joined from single takes of one speaker, with silence and noise between them.

The strings are joined, not spoken: there is no coarticulation. But a recogniser does not know how
many words there are or where, so insertions and deletions exist and the word error rate is one.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from train.data.audio import Utterance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strings:
    """How strings are joined."""

    shortest: int = 1
    """Fewest words."""
    longest: int = 5
    """Most words."""
    gap_s: tuple[float, float] = (0.03, 0.35)
    """Silence between words, drawn uniformly."""
    edge_s: tuple[float, float] = (0.05, 0.4)
    """Silence before the first and behind the last word."""
    bare: float = 0.3
    """Share of strings without silence around them, as single takes are cut."""
    noise: tuple[float, float] = (3e-5, 4e-3)
    """Background noise, share of full scale, drawn log-uniformly."""

    def __post_init__(self):
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"Strings: 1 <= shortest <= longest is needed, got {self.shortest} and "
                f"{self.longest}"
            )
        for name in ("gap_s", "edge_s", "noise"):
            low, high = getattr(self, name)
            if not 0 <= low <= high or (name == "noise" and low == 0):
                raise ValueError(f"Strings: {name} must be a range of positive numbers")
        if not 0 <= self.bare <= 1:
            raise ValueError(f"Strings: bare must lie in [0, 1], got {self.bare}")


@dataclasses.dataclass(frozen=True)
class Joined:
    """A string: its waveform, words, speaker, and the takes it was made of."""

    name: str
    speaker: str
    text: str
    wave: Float32[np.ndarray, "time"]


def join(
    takes: Sequence[Utterance], rate: int, options: Strings, random: np.random.Generator
) -> Joined:
    """One string of these takes in their order, with gaps, edges and a noise floor by chance."""
    edge = (0.0, 0.0) if random.uniform() < options.bare else options.edge_s
    pieces = [_silence(edge, rate, random)]
    for number, take in enumerate(takes):
        if number:
            pieces.append(_silence(options.gap_s, rate, random))
        pieces.append(take.waveform())
    pieces.append(_silence(edge, rate, random))
    wave = np.concatenate(pieces)
    low, high = np.log(options.noise)
    wave = wave + np.float32(np.exp(random.uniform(low, high))) * random.standard_normal(
        len(wave), np.float32
    )
    return Joined(
        "+".join(take.name for take in takes),
        takes[0].speaker,
        " ".join(take.text for take in takes),
        wave,
    )


def strings_of(
    takes: Sequence[Utterance], count: int, rate: int, options: Strings, seed: int
) -> list[Utterance]:
    """A fixed set of strings for a test: every speaker in turn, words and takes by chance."""
    random = np.random.default_rng(seed)
    speakers = sorted({take.speaker for take in takes})
    own = {name: [take for take in takes if take.speaker == name] for name in speakers}
    made = []
    for number in range(count):
        speaker = speakers[number % len(speakers)]
        words = random.integers(max(2, options.shortest), max(2, options.longest) + 1)
        chosen = [own[speaker][i] for i in random.integers(0, len(own[speaker]), words)]
        string = join(chosen, rate, options, random)
        samples = np.clip(np.rint(string.wave * 32768), -32768, 32767).astype(np.int16)
        made.append(Utterance(string.name, speaker, string.text, samples))
    return made


def _silence(
    seconds: tuple[float, float], rate: int, random: np.random.Generator
) -> Float32[np.ndarray, "time"]:
    return np.zeros(round(random.uniform(*seconds) * rate), np.float32)
