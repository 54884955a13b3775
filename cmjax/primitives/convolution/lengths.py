"""Signals of different lengths in one batch: where each exists, and zeros elsewhere.

y[b, t] = x[b, t]   if span[b, 0] <= t < span[b, 1],   else 0
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def zero_outside(
    x: Float[Array, "*lead frames channels"], span: Int[Array, "*lead 2"]
) -> Float[Array, "*lead frames channels"]:
    """`x` with zeros in the frames that do not exist.

    Args:
      x: signals.
      span: first frame of each and the one behind its last; they need not lie within x.
    """
    at = jnp.arange(x.shape[-2])
    inside = (at >= span[..., :1]) & (at < span[..., 1:])
    return jnp.where(inside[..., None], x, 0.0)


def check_span(function: str, span, lead: tuple) -> None:
    """Refuse what is no pair of integers for each signal; `lead` is the signals' leading shape."""
    if span.dtype != jnp.int32:
        raise TypeError(f"{function}: span must be int32, got {span.dtype}")
    if span.shape != (*lead, 2):
        raise ValueError(
            f"{function}: span must be {[*lead, 2]}, the first frame of each signal and the one "
            f"behind its last, got {list(span.shape)}"
        )
