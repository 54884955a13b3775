"""The memory of a DFSMN block: taps per channel over past and future frames, and the skip.

    y_t = x_t + p_t + sum_{i < N1} a_i p_{t - s1 i} + sum_{1 <= j <= N2} c_j p_{t + s2 j}

Source: Zhang et al., "Deep-FSMN for large vocabulary continuous speech recognition" (ICASSP 2018).
One primitive, because what it computes is little beside what it reads and writes. Every product
and every sum is rounded, in the order of the formula, so XLA and the C++ kernel give the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from cmjax import native
from cmjax.primitives.convolution.lengths import check_valid_range, zero_padding_frames
from cmjax.primitives.convolution.rsq import rounded
from cmjax.primitives.define import define, straight_through
from cmjax.program import Work, cost_rule


def fsmn_memory(
    x: Float[Array, "batch frames channels"],
    p: Float[Array, "batch context channels"],
    past: Float[Array, "N1 channels"],
    future: Float[Array, "N2 channels"],
    valid_range: Int32[Array, "batch 2"],
    *,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | None = None,
) -> Float32[Array, "batch frames channels"]:
    """The formula of this module.

    Args:
      x: what skips the memory.
      p: what goes into it, without the frames of `padding`.
      past, future: a, at least one row, and c, which may be empty.
      valid_range: first frame of each result that is no padding and the one behind its last,
        [start, stop); the frames outside are zero.
      strides: s1 and s2, frames from one tap to the next.
      padding: frames of zeros before and behind p. Default: all that the taps of the first and of
        the last frame see, `s1 (N1 - 1)` and `s2 N2`; a stream brings them instead.
    Raises: ValueError for shapes that do not fit each other, or strides below 1; TypeError for
      operands that are not floating point, or a valid_range that is not int32.
    Gradient: that of the formula.
    Example: a memory of the present and the last frame, over a signal of three ones.

      >>> x, p = jnp.zeros((1, 3, 1)), jnp.ones((1, 3, 1))
      >>> past, future = jnp.array([[1.0], [0.5]]), jnp.zeros((0, 1))
      >>> fsmn_memory(x, p, past, future, jnp.array([[0, 3]])).ravel().tolist()
      [2.0, 2.5, 2.5]
    """
    operands = tuple(map(jnp.asarray, (x, p, past, future)))
    for name, operand in zip(("x", "p", "past", "future"), operands, strict=True):
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise TypeError(f"fsmn_memory: {name} must be floating point, got {operand.dtype}")
    if x.ndim != 3:
        raise ValueError(f"fsmn_memory: x must be [batch, frames, channels], got {list(x.shape)}")
    floats = (operand.astype(jnp.float32) for operand in operands)
    if padding is None:
        padding = _reach(past, future, strides)
    return fsmn_memory_p.bind(*floats, valid_range, strides=tuple(strides), padding=tuple(padding))


def _reach(past, future, strides) -> tuple[int, int]:
    """Frames of the context before and behind the present one."""
    return (past.shape[-2] - 1) * strides[0], future.shape[-2] * strides[1]


def _formula(x, p, past, future, valid_range, *, strides, padding, product):
    zeros = [(0, 0, 0)] * p.ndim
    zeros[-2] = (*padding, 0)
    context = lax.pad(p, jnp.zeros((), p.dtype), zeros)
    present, count = _reach(past, future, strides)[0], x.shape[-2]

    def meets(tap, start):
        return product(tap[..., None, None, :], context[..., start : start + count, :])

    y = context[..., present : present + count, :]
    for i in range(past.shape[-2]):
        y = y + meets(past[..., i, :], present - strides[0] * i)
    for j in range(future.shape[-2]):
        y = y + meets(future[..., j, :], present + strides[1] * (j + 1))
    return zero_padding_frames(x + y, valid_range)


_reference = functools.partial(_formula, product=lambda tap, frames: rounded(tap * frames))
_exact = functools.partial(_formula, product=lambda tap, frames: tap * frames)


def _native(x, p, past, future, valid_range, *, strides, padding):
    if x.ndim != 3:
        return _reference(x, p, past, future, valid_range, strides=strides, padding=padding)
    return native.call(
        "cmjax_fsmn_memory",
        jax.ShapeDtypeStruct(x.shape, jnp.float32),
        x,
        p,
        past,
        future,
        valid_range,
        past_stride=np.int64(strides[0]),
        future_stride=np.int64(strides[1]),
        padding=np.int64(padding[0]),
    )


def _check(x, p, past, future, valid_range, *, strides, padding):
    name = "fsmn_memory"
    channels = x.shape[-1]
    if len(strides) != 2 or min(strides) < 1:
        raise ValueError(f"{name}: strides must be two numbers of at least 1, got {strides}")
    if past.ndim != x.ndim - 1 or past.shape[-2] < 1:
        raise ValueError(
            f"{name}: past must be [at least 1, {channels}], got {list(past.shape)}; its first row "
            "is the present frame"
        )
    for argument, taps in (("past", past), ("future", future)):
        if taps.ndim != x.ndim - 1 or taps.shape[-1] != channels:
            raise ValueError(
                f"{name}: {argument} must be [taps, {channels}], got {list(taps.shape)}"
            )
    context: Any = x.shape[-2] + sum(_reach(past, future, strides)) - sum(padding)
    if min(padding) < 0 or p.shape != (*x.shape[:-2], context, channels):
        raise ValueError(
            f"{name}: for x of {list(x.shape)}, {past.shape[-2]} and {future.shape[-2]} taps in "
            f"strides of {strides} and padding {padding}, p must be "
            f"{[*x.shape[:-2], context, channels]}, got {list(p.shape)}"
        )
    check_valid_range(name, valid_range, x.shape[:-2])


def _jvp(p, primals, tangents, **params):
    return straight_through(functools.partial(_exact, **params), p, primals, tangents, params)


fsmn_memory_p = define("cm_fsmn_memory", _reference, check=_check, jvp=_jvp, native=_native)


@cost_rule(fsmn_memory_p)
def _cost(x, p, past, future, valid_range, *, out, mesh, strides, padding) -> Work:
    """Vector instructions: a product and a sum per tap, two more sums, and the zeros outside."""
    taps = past.shape[-2] + future.shape[-2]
    return Work(
        vector_bytes=out[0].size * (taps * 2.0 + 3.0) * 4.0,
        flops=out[0].size * (taps * 2.0 + 2.0),
    )
