"""Augmentation of waveforms: speed (and pitch with it), volume, noise, and ends of other words."""

import dataclasses

import numpy as np
import soxr
from jaxtyping import Float32
from scipy.signal import lfilter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perturb:
    """Strength of each part; zeros switch it off."""

    speed: float = 0.12
    """Played faster or slower by up to this share: tempo, pitch and formants move together."""
    gain_db: float = 20.0
    """Louder or softer by up to so many decibels, clipped at full scale."""
    noise_share: float = 0.6
    """Share of utterances that get noise."""
    snr_db: tuple[float, float] = (8.0, 35.0)
    """Signal-to-noise ratio of it."""
    remnant_share: float = 0.1
    """Share of utterances behind the end of a word that is not in their transcript, as where a
    recording is cut out of a longer one."""

    def __post_init__(self):
        if not (0 <= self.speed < 0.5 and self.gain_db >= 0):
            raise ValueError(
                "Perturb: 0 <= speed < 0.5 and gain_db >= 0 are needed, got "
                f"{self.speed} and {self.gain_db}"
            )
        if not 0 <= self.remnant_share <= 1:
            raise ValueError(f"Perturb: remnant_share must lie in [0, 1], got {self.remnant_share}")
        if not 0 <= self.noise_share <= 1 or self.snr_db[0] > self.snr_db[1]:
            raise ValueError("Perturb: noise_share must lie in [0, 1], snr_db must be a range")


def perturb(
    wave: Float32[np.ndarray, "time"], options: Perturb, random: np.random.Generator
) -> Float32[np.ndarray, "time"]:
    """`wave` as somebody else would say it elsewhere; the result depends on `random` alone."""
    if options.speed:
        # Whole percents: resampling ratios that are simple, as in Ko et al. (2015).
        percent = 100 + round(100 * random.uniform(-options.speed, options.speed))
        wave = soxr.resample(wave, percent, 100, quality="MQ") if percent != 100 else wave
    level = float(np.sqrt(np.mean(np.square(wave)) + 1e-12))
    if random.uniform() < options.noise_share:
        snr = 10 ** (random.uniform(*options.snr_db) / 20)
        wave = wave + _coloured(len(wave), random) * np.float32(level / snr)
    gain = 10 ** (random.uniform(-options.gain_db, options.gain_db) / 20)
    return np.clip(wave * np.float32(gain), -1, 1)


def behind_remnant(
    wave: Float32[np.ndarray, "time"],
    word: Float32[np.ndarray, "other"],
    rate: int,
    random: np.random.Generator,
) -> Float32[np.ndarray, "longer"]:
    """`wave` behind the end of `word`: at most its second half and 0.25 s, at most 20 dB softer."""
    longest = min(len(word) // 2, rate // 4)
    end = word[len(word) - random.integers(1, max(2, longest)) :]
    return np.concatenate([end * np.float32(10 ** (random.uniform(-20, 0) / 20)), wave])


def _coloured(length: int, random: np.random.Generator) -> Float32[np.ndarray, "time"]:
    """Noise of unit power, white to brown."""
    pole = random.uniform(0, 0.98)
    noise = lfilter([1.0], [1.0, -pole], random.standard_normal(length, np.float32))
    return np.asarray(noise * np.sqrt(1 - pole**2), np.float32)
