"""Signals of different lengths padded to one batch: zeros in the frames that are padding.

y[b, t] = x[b, t]   if start[b] <= t < stop[b],   else 0
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def zero_padding_frames(
    x: Float[Array, "*batch frames channels"], valid_range: Int[Array, "*batch 2"]
) -> Float[Array, "*batch frames channels"]:
    """`x` with zeros in the frames outside the valid range.

    Args:
      x: signals.
      valid_range: first frame of each signal and the one behind its last, [start, stop); they need
        not lie within x.
    """
    at = jnp.arange(x.shape[-2])
    valid = (at >= valid_range[..., :1]) & (at < valid_range[..., 1:])
    return jnp.where(valid[..., None], x, 0.0)


def check_valid_range(function: str, valid_range, batch: tuple) -> None:
    """Refuse what is no pair of integers for each signal; `batch` is the signals' leading shape."""
    if valid_range.dtype != jnp.int32:
        raise TypeError(f"{function}: valid_range must be int32, got {valid_range.dtype}")
    if valid_range.shape != (*batch, 2):
        raise ValueError(
            f"{function}: valid_range must be {[*batch, 2]}, the first frame of each signal and "
            f"the one behind its last, got {list(valid_range.shape)}"
        )
