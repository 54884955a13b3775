"""Augmentation of features inside the compiled step: masks, vocal-tract warping, other microphones.

SpecAugment (Park et al., 2019) without time warping: bands [f0, f0 + f) and frames [t0, t0 + t) are
replaced by the utterance's mean, with f ~ U{0..F}, t ~ U{0..min(T, p * frames)}.
Vocal-tract length perturbation (Jaitly and Hinton, 2013): band at frequency v reads from alpha * v,
so that one speaker sounds like one with a longer or shorter vocal tract.
Frequency responses: the curve sum_k w_k cos(pi k (b + 1/2) / bands), w_k ~ N(0, s^2 / k), is added
to the bands b of all frames. It is what subtracting an utterance's mean cepstrum would take away; a
stream has no mean yet, so the network learns that the curve says nothing. (FilterAugment, Nam et
al., ICASSP 2022, draws steps or lines instead of cosines.)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cmjax.models.asr.features import LogMel, band_centres

_ORDERS = 5  # cosines of a frequency response; the last has two and a half periods


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecAugment:
    """How much to mask, warp and colour; zeros switch a part off.

    The masks are small ones: words of a third of a second lose too much to those of SpecAugment's
    long utterances.
    """

    band_masks: int = 1
    """Masks over bands."""
    band_width: int = 5
    """Widest of them, in bands."""
    time_masks: int = 1
    """Masks over frames."""
    time_width: int = 6
    """Longest of them, in frames."""
    time_share: float = 0.15
    """Longest of them as a share of the utterance: a short word is not wiped out."""
    warp: float = 0.12
    """Vocal-tract factors are drawn from [1 - warp, 1 + warp]."""
    response_db: float = 3.5
    """Root mean square of the random frequency response of an utterance, dB."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(
                    f"SpecAugment: {field.name} must not be negative, got "
                    f"{getattr(self, field.name)}"
                )
        if not self.warp < 1 or not self.time_share <= 1:
            raise ValueError(
                "SpecAugment: warp must be below 1 and time_share at most 1, got "
                f"{self.warp} and {self.time_share}"
            )


def spec_augment(
    keys: Key[Array, "batch"],
    features: Float[Array, "batch frames bands"],
    lengths: Int[Array, "batch"],
    options: SpecAugment,
) -> Float[Array, "batch frames bands"]:
    """Features with masked bands and frames; padding behind `lengths` is left as it is.

    One key an utterance: what happens to it does not depend on the batch around it.
    """
    return jax.vmap(lambda key, x, length: _masked(key, x, length, options))(
        keys, features, lengths
    )


def warp_vocal_tract(
    keys: Key[Array, "batch"],
    features: Float[Array, "batch frames bands"],
    front: LogMel,
    warp: float,
) -> Float[Array, "batch frames bands"]:
    """Every utterance's bands moved by a factor of [1 - warp, 1 + warp] in frequency."""
    centres = band_centres(front)
    hz = (700.0 * np.expm1(centres / 1127.0)).astype(np.float32)
    first, width = float(centres[0]), float(centres[1] - centres[0])

    def moved(key, x):
        factor = jax.random.uniform(key, (), minval=1 - warp, maxval=1 + warp)
        wanted = 1127.0 * jnp.log1p(factor * hz / 700.0)
        place = jnp.clip((wanted - first) / width, 0, len(hz) - 1)
        low = jnp.minimum(place.astype(int), len(hz) - 2)
        share = place - low
        return x[:, low] * (1 - share) + x[:, low + 1] * share

    return jax.vmap(moved)(keys, features)


def colour(
    keys: Key[Array, "batch"],
    features: Float[Array, "batch frames bands"],
    front: LogMel,
    response_db: float,
) -> Float[Array, "batch frames bands"]:
    """Every utterance through a smooth frequency response of its own, and not below the floor.

    Args:
      keys: one an utterance.
      features: natural logarithms of energies.
      front: their front end.
      response_db: root mean square of the response over bands and utterances.
    """
    orders = np.arange(1, _ORDERS + 1)
    curves = np.cos(np.pi * orders[:, None] * (np.arange(front.bands) + 0.5) / front.bands)
    spread = response_db * np.log(10) / 10 * np.sqrt(2 / (orders * (1 / orders).sum()))
    weights = jax.vmap(lambda key: jax.random.normal(key, (_ORDERS,)))(keys) * spread
    coloured = features + (weights @ curves)[:, None]
    return jnp.maximum(coloured, np.log(front.floor)).astype(features.dtype)


def _masked(key, x, length, options: SpecAugment) -> Array:
    """`spec_augment` of one utterance, `[frames, bands]`."""
    frames, bands = x.shape
    inside = jnp.arange(frames) < length
    mean = jnp.where(inside[:, None], x, 0).sum() / jnp.maximum(length * bands, 1)
    band_key, time_key = jax.random.split(key)
    longest = jnp.minimum(options.time_width, (options.time_share * length).astype(int))
    in_band = _stripes(band_key, bands, bands, options.band_masks, options.band_width)
    in_time = _stripes(time_key, frames, length, options.time_masks, longest)
    return jnp.where((in_band | in_time[:, None]) & inside[:, None], mean, x)


def _stripes(key, size: int, limit, count: int, widest) -> Array:
    """Boolean `[size]`: the union of `count` random intervals inside `[0, limit)`."""
    width_key, start_key = jax.random.split(key)
    width = jnp.floor(jax.random.uniform(width_key, (count, 1)) * (widest + 1))
    start = jnp.floor(jax.random.uniform(start_key, (count, 1)) * (limit - width + 1))
    at = jnp.arange(size)
    return ((at >= start) & (at < start + width)).any(axis=0)
