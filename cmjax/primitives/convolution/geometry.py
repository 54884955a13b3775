"""Any one-dimensional convolution as one with stride 1: padding modes, strides and dilations.

    y[t] = sum_j x[s t + d j - low] w[j]

A stride s folds s neighbouring frames into channels: `[length, cin]` becomes `[length/s, s cin]`
and the k taps become ceil(k/s) taps of s cin channels. Zeros that fill up the taps go in front if
that lets the windows of a centred filter begin with a folded frame: a signal of whole folded frames
is then folded by reading it otherwise, and nothing is copied. Where d is a multiple of s, or there
is one tap, every s-th frame alone is read.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Padding = str | tuple[int, int] | Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Folding:
    """How a filter with stride and dilation becomes one without stride.

    Fields:
      stride: s, of the convolution asked for.
      extent: frames from its first to its last tap.
      taps: taps of the folded filter.
      dilation: dilation of the folded filter.
      frames: neighbouring frames that become channels; 1 where every s-th frame is read alone.
      spread: zeros between the taps, plus one, put in before folding.
      lead: zero taps in front of the filter, put in before folding.
    """

    stride: int
    extent: int
    taps: int
    dilation: int
    frames: int
    spread: int
    lead: int


def folding(taps: int, stride: int, dilation: int) -> Folding:
    """The folding of a filter of `taps` taps."""
    extent = dilation * (taps - 1) + 1
    if taps == 1 or dilation % stride == 0:
        return Folding(stride, extent, taps, 1 if taps == 1 else dilation // stride, 1, 1, 0)
    lead = -((extent - 1) // 2) % stride  # "SAME" puts (extent - 1) // 2 zeros before the signal
    whole = -(-extent // stride)
    return Folding(
        stride, extent, whole, 1, stride, dilation, lead if extent + lead <= whole * stride else 0
    )


def fold_filter(
    w: Float[Array, "taps cin cout"], fold: Folding
) -> Float[Array, "folded_taps folded_cin cout"]:
    """The filter of the convolution without stride."""
    _, cin, cout = w.shape
    if fold.frames == 1:
        return w
    spread = jnp.zeros((fold.taps * fold.frames, cin, cout), w.dtype)
    taken = slice(fold.lead, fold.lead + fold.extent, fold.spread)
    return spread.at[taken].set(w).reshape(fold.taps, fold.frames * cin, cout)


def fold_input(
    x: Float[Array, "batch length cin"], padding: tuple[Any, Any], fold: Folding
) -> tuple[Float[Array, "batch folded_length folded_cin"], tuple[Any, Any]]:
    """The input of the convolution without stride, and the padding that it still needs."""
    low, high = padding
    if not isinstance(low, int) or low < 0 or not isinstance(high, int) or high < 0:
        x, (low, high) = _padded(x, padding), (0, 0)
    if fold.stride == 1:
        return x, (low, high)
    batch, length, cin = x.shape
    outputs = (length + low + high - fold.extent) // fold.stride + 1
    frames = outputs + fold.dilation * (fold.taps - 1)
    front, odd = divmod(low + fold.lead, fold.stride)
    whole = -(-length // fold.stride)
    known = isinstance(length, int)  # else it is symbolic, and may not be compared
    if fold.frames > 1 and not odd and known and front + whole <= frames:
        x = _padded(x, (0, whole * fold.stride - length))
        folded = x.reshape(batch, whole, fold.stride * cin)
        return folded, (front, frames - front - whole)
    # Frames behind the last window are cut off; where it reads past the end, its taps are zero.
    low += fold.lead
    x = _padded(x, (low, frames * fold.stride - length - low))
    if fold.frames == 1:
        return x[:, :: fold.stride], (0, 0)
    return x.reshape(batch, frames, fold.stride * cin), (0, 0)


def explicit_padding(
    function: str, padding: Padding, length: Any, taps: int, stride: int, dilation: int
) -> tuple[Any, Any]:
    """Frames of zeros before and after the input, negative for frames cut off.

    Args:
      function: name for errors.
      padding: "SAME", "SAME_LOWER" or "VALID" as `jax.lax.conv_general_dilated` has them, or
        (low, high), or [(low, high)].
      length: input frames.
      taps, stride, dilation: of the convolution.
    Raises: ValueError for anything else.
    """
    extent = dilation * (taps - 1) + 1
    if isinstance(padding, str):
        modes = ("SAME", "SAME_LOWER", "VALID")
        if padding not in modes:
            raise ValueError(
                f"{function}: padding must be one of {modes} or (low, high), got {padding!r}"
            )
        if padding == "VALID":
            return 0, 0
        if stride == 1:
            total = extent - 1
        else:
            total = (-(-length // stride) - 1) * stride + extent - length
            total = total if extent >= stride else max(total, 0)  # else it is not negative
        small = total // 2
        return (small, total - small) if padding == "SAME" else (total - small, small)
    pair = np.asarray(padding, dtype=object).reshape(-1)
    if len(pair) != 2 or not all(isinstance(frames, int) for frames in pair):
        raise ValueError(
            f"{function}: padding must be a mode or (low, high) frames, got {padding!r}"
        )
    return pair[0], pair[1]


def _padded(x: Array, padding: tuple[Any, Any]) -> Array:
    """Zeros put in front and behind along axis 1; a negative count cuts frames off."""
    config = [(0, 0, 0), (*padding, 0), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)
