"""NaN and infinities in a convolution of integers, which have no word for them.

    xi = 0                 where x is not finite: no other frame's quantization may feel it
    y[t] = NaN             if one of the frames that y[t] is made of is not finite
    y[:, o] = NaN          if the filter of output channel o is not finite

A NaN that became an integer would be a wrong number that looks right. An infinity is no large
value here: a quantizer that let it saturate would hide it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from cmjax.primitives.convolution.geometry import Folding


class Reach(NamedTuple):
    """Which frames of a folded signal an output is made of: `t frames + lead + spread j`, j < taps.

    Frames are counted as they were before `frames` of them became channels.
    """

    frames: int
    lead: int
    spread: int
    taps: int

    @staticmethod
    def of(fold: Folding) -> "Reach":
        """The reach of a filter that was folded so."""
        if fold.frames == 1:
            return Reach(1, 0, fold.dilation, fold.taps)
        return Reach(fold.frames, fold.lead, fold.spread, (fold.extent - 1) // fold.spread + 1)


def without_nonfinite(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` with zeros for what is not finite."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def reached(
    x: Float[Array, "batch length channels"],
    reach: Reach,
    *,
    padding: tuple[Any, Any],
    outputs: Any,
    groups: int = 1,
) -> Bool[Array, "batch outputs groups"]:
    """Outputs that a value which is not finite reaches.

    Args:
      x: the folded signal.
      reach: of its filter.
      padding: folded frames of zeros before and behind x.
      outputs: frames of the result.
      groups: groups of channels that do not meet.
    """
    batch, length, channels = x.shape
    of_group = channels // (reach.frames * groups)
    bad = ~jnp.isfinite(x).reshape(batch, length, reach.frames, groups, of_group)
    bad = jnp.any(bad, axis=-1).reshape(batch, length * reach.frames, groups)
    low = padding[0] * reach.frames - reach.lead
    needed = reach.frames * (outputs - 1) + reach.spread * (reach.taps - 1) + 1
    high = needed - length * reach.frames - low
    around = [(0, 0, 0), (low, high, 0), (0, 0, 0)]
    window = (1, reach.taps, 1)
    any_tap = lax.reduce_window(
        lax.pad(bad.astype(jnp.uint8), jnp.uint8(0), around),
        jnp.uint8(0),
        lax.max,
        window,
        (1, reach.frames, 1),
        "VALID",
        window_dilation=(1, reach.spread, 1),
    )
    return any_tap != 0


def nan_where(
    y: Float[Array, "batch outputs cout"], hit: Bool[Array, "batch outputs groups"]
) -> Float[Array, "batch outputs cout"]:
    """`y` with NaN where its group of channels is hit."""
    groups = hit.shape[-1]
    split = y.reshape(*y.shape[:2], groups, y.shape[-1] // groups)
    return jnp.where(hit[..., None], jnp.nan, split).reshape(y.shape)


def steps_of_finite(
    filter_step: Float32[Array, "points cout"], u: Array
) -> Float32[Array, "points cout"]:
    """The steps of a filter's quantization, NaN for output channels that it is not finite in.

    The mark is taken up at the end: the minima that keep a rounding may drop a NaN on their way.

    Args:
      filter_step: the steps.
      u: the transformed filter, [points, depth, cout]; integers are finite.
    """
    if not jnp.issubdtype(u.dtype, jnp.floating):
        return filter_step
    return jnp.where(jnp.all(jnp.isfinite(u), axis=(0, 1)), filter_step, jnp.nan)
