"""Log-mel filterbank energies, as Kaldi's `compute-fbank-feats` computes them.

    frame t = samples [t S, t S + N)       S = 10 ms, N = 25 ms, only whole frames
    minus its mean -> x[n] - 0.97 x[n-1] -> Povey window -> |FFT|^2 -> mel triangles -> log

Source: Povey et al., "The Kaldi speech recognition toolkit" (ASRU 2011), feature extraction with
dither 0; the triangles are O'Shaughnessy's mel scale, 1127 ln(1 + f / 700).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from cmjax import native
from cmjax.primitives.define import define
from cmjax.program import Work, cost_rule

PRE_EMPHASIS = 0.97
_BANDS_AT_ONCE = 16
FULL_SCALE = 32768.0  # Kaldi reads 16-bit integers; here a sample is a fraction of full scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogMel:
    """Options of the front end. Raises ValueError for bands that do not fit the sample rate."""

    sample_rate: int = 8000
    """Samples per second."""
    bands: int = 40
    """Mel bands."""
    frame_s: float = 0.025
    """Length of a frame."""
    shift_s: float = 0.010
    """Distance of two frames."""
    low_hz: float = 20.0
    """Lower edge of the first band; the last band ends at half the sample rate."""
    floor: float = 1.0
    """Smallest energy, for 16-bit samples: below it there is only the rounding of the recording."""

    def __post_init__(self):
        if self.shift < 1 or self.frame < 2:
            raise ValueError(
                f"LogMel: frame_s={self.frame_s} and shift_s={self.shift_s} are less than two "
                f"samples and one at sample_rate={self.sample_rate}"
            )
        if not 0 <= self.low_hz < self.sample_rate / 2:
            raise ValueError(
                f"LogMel: low_hz must lie in [0, {self.sample_rate / 2}), got {self.low_hz}"
            )
        if self.bands < 1 or self.floor <= 0:
            raise ValueError(
                f"LogMel: bands and floor must be positive, got {self.bands} and {self.floor}"
            )
        if not mel_filters(self).any(axis=0).all():
            raise ValueError(
                f"LogMel: bands={self.bands} are too narrow for frames of {self.frame} samples: "
                "a band would hold no FFT bin; use fewer bands or a longer frame"
            )

    @property
    def frame(self) -> int:
        """Samples in a frame."""
        return int(self.sample_rate * self.frame_s)

    @property
    def shift(self) -> int:
        """Samples between the starts of two frames."""
        return int(self.sample_rate * self.shift_s)

    @property
    def fft(self) -> int:
        """Points of the FFT: the next power of two."""
        return 1 << (self.frame - 1).bit_length()

    def frames(self, samples):
        """Whole frames in so many samples (an integer or an array of them)."""
        return (samples - self.frame + self.shift).clip(0) // self.shift

    def samples(self, frames: int) -> int:
        """Fewest samples that hold so many frames."""
        return self.frame + (frames - 1) * self.shift if frames else 0


def log_mel(
    samples: Float[Array, "*batch time"], options: LogMel
) -> Float32[Array, "*batch frames bands"]:
    """Log energies of mel bands.

    Args:
      samples: waveforms, fractions of full scale, at `options.sample_rate`.
      options: the front end.
    Returns:
      natural logarithms of energies; `options.frames(time)` frames.
    Raises:
      TypeError: samples are not floating point.
      ValueError: samples hold less than one frame.
    """
    if not jnp.issubdtype(samples.dtype, jnp.floating):
        raise TypeError(
            "log_mel: samples must be floating point, fractions of full scale, got "
            f"{samples.dtype}; divide 16-bit integers by {FULL_SCALE:.0f}"
        )
    count = int(options.frames(np.int64(samples.shape[-1])))
    if count < 1:
        raise ValueError(
            f"log_mel: samples must hold at least one frame of {options.frame}, got "
            f"{samples.shape[-1]}"
        )
    energies = mel_energies_p.bind(samples.astype(jnp.float32), options=options)
    return jnp.log(jnp.maximum(energies, options.floor))


def mel(hz):
    """O'Shaughnessy's mel scale."""
    return 1127.0 * np.log1p(np.asarray(hz, np.float64) / 700.0)


@functools.cache
def mel_filters(options: LogMel) -> Float32[np.ndarray, "bins bands"]:
    """Triangles, equally wide in mel; each rises from its neighbour's centre and falls to the next.

    FFT bins are 0 to `fft / 2`; Kaldi leaves the last one out, and so does this.
    """
    edges = np.linspace(mel(options.low_hz), mel(options.sample_rate / 2), options.bands + 2)
    bins = mel(np.arange(options.fft // 2) * options.sample_rate / options.fft)[:, None]
    width = edges[1] - edges[0]
    rising, falling = (bins - edges[:-2]) / width, (edges[2:] - bins) / width
    triangles = np.minimum(rising, falling).clip(0)
    return np.concatenate([triangles, np.zeros((1, options.bands))]).astype(np.float32)


def band_centres(options: LogMel) -> Float[np.ndarray, "bands"]:
    """Mel value of every band's centre."""
    edges = np.linspace(mel(options.low_hz), mel(options.sample_rate / 2), options.bands + 2)
    return edges[1:-1]


def _reference(samples, *, options: LogMel) -> Float32[Array, "*batch frames bands"]:
    count = int(options.frames(np.int64(samples.shape[-1])))
    spectrum = jnp.fft.rfft(_windowed(samples * FULL_SCALE, count, options))
    return _mel_energies(jnp.square(spectrum.real) + jnp.square(spectrum.imag), options)


def _native(samples, *, options: LogMel) -> Float32[Array, "*batch frames bands"]:
    """The same sums of float32 in another order."""
    *lead, length = samples.shape
    count = int(options.frames(np.int64(length)))
    filters = mel_filters(options).T
    bins = [np.flatnonzero(band) for band in filters]
    inside = [(some[0], some[-1] + 1) for some in bins]
    angles = -2 * np.pi * np.arange(options.fft) / options.fft
    energies = native.call(
        "cmjax_mel_energies",
        jax.ShapeDtypeStruct((math.prod(lead), count, options.bands), jnp.float32),
        samples.reshape(math.prod(lead), length),
        jnp.asarray(_povey(options.frame) * FULL_SCALE, jnp.float32),
        jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=-1), jnp.float32),
        jnp.asarray(filters),
        jnp.asarray(inside, jnp.int32),
        shift=np.int64(options.shift),
        emphasis=np.float32(PRE_EMPHASIS),
    )
    return energies.reshape(*lead, count, options.bands)


def _windowed(x: Array, count: int, options: LogMel) -> Float32[Array, "*batch count fft"]:
    """Frames of samples without their mean, pre-emphasised, windowed, and with zeros behind.

    Pre-emphasis is that of the whole signal: the two differ in the first sample of a frame, where
    the window is zero. What it leaves of the mean is `(1 - PRE_EMPHASIS)` of it.
    """
    shift, frame = options.shift, options.frame
    starts = range(0, frame, shift)
    widths = [min(shift, frame - start) for start in starts]
    length = (count - 1 + len(widths)) * shift
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(0, length - x.shape[-1]))])[..., :length]
    before = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1]
    # XLA would compute what is in a barrier anew for every frame that it is part of.
    emphasised = lax.optimization_barrier(x - PRE_EMPHASIS * before)
    steps = length // shift
    rows, emphasised = (y.reshape(*y.shape[:-1], steps, shift) for y in (x, emphasised))
    sums = {width: rows[..., :width].sum(axis=-1) for width in set(widths)}
    total = sum(sums[width][..., j : j + count] for j, width in enumerate(widths))
    left = lax.optimization_barrier(total * ((1 - PRE_EMPHASIS) / frame))[..., None]
    window = _povey(frame)
    parts = [
        (emphasised[..., j : j + count, :width] - left) * window[start : start + width]
        for j, (start, width) in enumerate(zip(starts, widths, strict=True))
    ]
    behind = jnp.zeros((*x.shape[:-1], count, options.fft - frame), jnp.float32)
    return jnp.concatenate([*parts, behind], axis=-1)


def _mel_energies(
    power: Float32[Array, "*batch bins"], options: LogMel
) -> Float32[Array, "*batch bands"]:
    """`power @ mel_filters`, without most of the products with zeros: a few bands at a time."""
    filters, energies = mel_filters(options), []
    for first in range(0, options.bands, _BANDS_AT_ONCE):
        some = filters[:, first : first + _BANDS_AT_ONCE]
        (bins,) = some.any(axis=1).nonzero()
        inside = slice(bins[0], bins[-1] + 1)
        energies.append(power[..., inside] @ some[inside])
    return jnp.concatenate(energies, axis=-1)


@functools.cache
def _povey(frame: int) -> Float32[np.ndarray, "frame"]:
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(frame) / (frame - 1))
    return (hann**0.85).astype(np.float32)


mel_energies_p = define("cm_mel_energies", _reference, native=_native)


@cost_rule(mel_energies_p)
def _cost(samples, *, out, mesh, options: LogMel) -> Work:
    """Vector instructions per frame: window, a real FFT (5/2 n log2 n), power, two bands a bin."""
    points = options.fft
    instructions = 4.0 * options.frame + 2.5 * points * math.log2(points) + 3.5 * points
    frames = out[0].size / options.bands
    return Work(vector_bytes=frames * (instructions * 4.0), flops=frames * instructions)
