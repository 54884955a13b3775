"""Spoken digits made in code: a formant synthesiser with many voices.

Source and filter (Klatt, "Software for a cascade/parallel formant synthesizer", JASA 1980): pulses
of the glottis through a cascade of resonators at the formants, noise through one of its own,

    y[n] = (1 - b - c) x[n] + b y[n-1] + c y[n-2]
    c = -exp(-2 pi B T),    b = 2 exp(-pi B T) cos(2 pi F T)

with targets that glide from phone to phone. Formants of vowels: Peterson and Barney (1952), men.
It is for tests and first runs: easier than people, but with voices, tempo and noise that vary.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float32
from scipy.ndimage import convolve1d
from scipy.signal import lfilter

from train.data.audio import Utterance
from train.data.corpus import Corpus

RATE = 8000
_STEP = RATE // 100  # samples between two settings of the resonators: 10 ms
_BANDWIDTHS = (80.0, 110.0, 160.0)


@dataclasses.dataclass(frozen=True)
class Voice:
    """A speaker.

    Attributes:
      pitch_hz: mean pitch.
      tract: formants are multiplied by it (1 is a man, 1.17 about a woman).
      tempo: phones last this much shorter.
      breath: noise in the pulses, as a share of them.
      tilt: 0 to 1, how dull the voice is.
    """

    pitch_hz: float
    tract: float
    tempo: float
    breath: float
    tilt: float


@dataclasses.dataclass(frozen=True)
class _Phone:
    formants: tuple[float, float, float]
    seconds: float
    voiced: float = 1.0
    noise: float = 0.0
    noise_hz: float = 0.0


_PHONES = {
    "IY": _Phone((270, 2290, 3010), 0.12),
    "IH": _Phone((390, 1990, 2550), 0.09),
    "EH": _Phone((530, 1840, 2480), 0.10),
    "AA": _Phone((730, 1090, 2440), 0.11),
    "AH": _Phone((640, 1190, 2390), 0.10),
    "AO": _Phone((570, 840, 2410), 0.13),
    "UW": _Phone((300, 870, 2240), 0.14),
    "R": _Phone((330, 1060, 1400), 0.07, 0.7),
    "W": _Phone((300, 610, 2200), 0.07, 0.6),
    "N": _Phone((280, 1600, 2600), 0.08, 0.35),
    "V": _Phone((230, 1100, 2080), 0.06, 0.3, 0.06, 1800),
    "Z": _Phone((240, 1400, 2500), 0.09, 0.2, 0.25, 3300),
    "S": _Phone((320, 1400, 2500), 0.11, 0.0, 0.45, 3500),
    "F": _Phone((340, 1100, 2080), 0.10, 0.0, 0.12, 2300),
    "TH": _Phone((320, 1290, 2540), 0.09, 0.0, 0.08, 2900),
    "closed": _Phone((300, 1500, 2500), 0.05, 0.0),
    "T": _Phone((300, 1700, 2600), 0.03, 0.0, 0.5, 3300),
    "K": _Phone((300, 1900, 2500), 0.03, 0.0, 0.45, 1900),
}
_WORDS = {
    "zero": "Z IH R AO UW",
    "one": "W AH N",
    "two": "T UW",
    "three": "TH R IY",
    "four": "F AO R",
    "five": "F AA IH V",
    "six": "S IH closed K S",
    "seven": "S EH V AH N",
    "eight": "EH IY closed T",
    "nine": "N AA IH N",
}


def voice(random: np.random.Generator) -> Voice:
    """A voice by chance: pitch 85 to 250 Hz, tract correlated with it."""
    pitch = float(np.exp(random.uniform(np.log(85), np.log(250))))
    tract = 1.0 + 0.17 * np.log2(pitch / 110) + random.normal(0, 0.03)
    return Voice(
        pitch_hz=pitch,
        tract=float(np.clip(tract, 0.85, 1.3)),
        tempo=float(random.uniform(0.8, 1.3)),
        breath=float(random.uniform(0.02, 0.2)),
        tilt=float(random.uniform(0.0, 0.6)),
    )


def speak(word: str, who: Voice, random: np.random.Generator) -> Float32[np.ndarray, "time"]:
    """One take of a digit's name at 8 kHz; no two are alike.

    Raises: ValueError for a word it cannot say.
    """
    if word not in _WORDS:
        raise ValueError(f"speak: {word!r} is not one of {', '.join(_WORDS)}")
    phones = [_PHONES[name] for name in _WORDS[word].split()]
    steps = [
        max(2, round(p.seconds / who.tempo * random.uniform(0.8, 1.25) * RATE / _STEP))
        for p in phones
    ]
    tracks = _tracks(phones, steps, random)
    pulses = _pulses(who, sum(steps), random)
    noise = random.normal(size=len(pulses))
    out = _filter(pulses, noise, tracks, who)
    edge = np.arange(len(out)) / (0.008 * RATE)
    out = out * np.minimum(1, np.minimum(edge, edge[::-1]))
    return (0.3 * random.uniform(0.6, 1.4) * out / np.abs(out).max()).astype(np.float32)


@functools.cache
def digits(
    *, voices: int = 16, unseen: int = 4, takes: int = 5, test_takes: int = 1, seed: int = 0
) -> Corpus:
    """Takes of all ten digits: `voices` to learn from, `unseen` more that only the test hears.

    Tests: "test" has new takes of the voices learnt from, "unseen" the other voices.
    """
    random = np.random.default_rng(seed)
    train, seen, held = [], [], []
    for number in range(voices + unseen):
        who = voice(random)
        speaker = f"voice{number:02}"
        for word in _WORDS:
            for take in range(takes + test_takes):
                samples = speak(word, who, random)
                samples = samples + (10 ** random.uniform(-4, -2.3)) * random.normal(
                    size=len(samples)
                )
                utterance = Utterance(
                    f"{word}_{speaker}_{take}",
                    speaker,
                    word,
                    np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16),
                )
                group = seen if take < test_takes else train
                (held if number >= voices else group).append(utterance)
    tests = {"test": tuple(seen), "unseen": tuple(held)}
    return Corpus(
        train=tuple(train),
        tests={name: utterances for name, utterances in tests.items() if utterances},
        units="words",
        rate=RATE,
        joinable=True,
    )


def _tracks(phones, steps, random) -> dict[str, np.ndarray]:
    """Settings every 10 ms: targets held for a phone, then smoothed so that they glide."""
    accent = 1 + 0.04 * random.normal(size=3)

    def held(values):
        return np.repeat(np.asarray(values, float), steps, axis=0)

    def glide(track, width):
        kernel = np.hanning(width + 2)[1:-1]
        return convolve1d(track, kernel / kernel.sum(), axis=0, mode="nearest")

    return {
        "formants": glide(held([p.formants for p in phones]), 5) * accent,
        "voiced": glide(held([p.voiced for p in phones]), 3),
        "noise": glide(held([p.noise for p in phones]), 3),
        "noise_hz": held([p.noise_hz or 2000.0 for p in phones]),
    }


def _pulses(who: Voice, steps: int, random) -> np.ndarray:
    """Pulses of the glottis: falling pitch with jitter, a dull or bright slope, some breath."""
    length = steps * _STEP
    fall = np.linspace(1.08, 0.88, length) * (1 + 0.03 * random.normal())
    drift = 1 + 0.01 * np.repeat(random.normal(size=steps), _STEP)
    phase = np.cumsum(who.pitch_hz * fall * drift / RATE) + random.uniform()
    pulses = np.diff(np.floor(phase), prepend=np.floor(phase[0]))
    pulses = pulses + who.breath * 0.3 * random.normal(size=length)
    slope = 0.6 + 0.35 * who.tilt
    return lfilter([1 - slope], [1, -slope], pulses) * np.sqrt(RATE / who.pitch_hz)


def _resonator(hz: float, bandwidth: float) -> tuple[list[float], list[float]]:
    c = -np.exp(-2 * np.pi * bandwidth / RATE)
    b = 2 * np.exp(-np.pi * bandwidth / RATE) * np.cos(2 * np.pi * hz / RATE)
    return [1 - b - c], [1, -b, -c]


def _filter(pulses, noise, tracks, who: Voice) -> np.ndarray:
    states = np.zeros((3, 2))
    noise_state = np.zeros(2)
    out = np.empty_like(pulses)
    for step, formants in enumerate(tracks["formants"]):
        at = slice(step * _STEP, (step + 1) * _STEP)
        voiced = tracks["voiced"][step] * pulses[at]
        for number, (hz, bandwidth) in enumerate(zip(formants, _BANDWIDTHS, strict=True)):
            taps = _resonator(min(hz * who.tract, 0.47 * RATE), bandwidth)
            voiced, states[number] = lfilter(*taps, voiced, zi=states[number])
        taps = _resonator(min(tracks["noise_hz"][step] * who.tract**0.5, 0.46 * RATE), 700.0)
        hiss, noise_state = lfilter(*taps, tracks["noise"][step] * noise[at], zi=noise_state)
        out[at] = voiced + 0.6 * hiss
    return out
