"""Fake quantization with a learned step and a chosen integer range, as one primitive.

    y = step * clip(round(x / step), low, high)

The range is free ("range-scaled", after Yao et al., RSQ, arXiv:2010.14841: integers that a Winograd
transform then enlarges need a range of their own, neither the dtype's nor the worst case's), and
what leaves it saturates. The derivative is chosen, since rounding is flat: straight-through inside
the range and zero outside for `x`, and for the step the rule of LSQ (Esser et al. 2020,
arXiv:1902.08153, equation 3), times its gradient scale if one is given:

    dy/dstep = round(x / step) - x / step   if low < x / step < high,   else low or high
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from cmjax.primitives.define import Zero, clamp, count_where, define
from cmjax.program import Work, cost_rule

_LARGEST_LIMIT = 2**23  # integers and their halves are exact in float32 up to here
# Share of an end of the range by which x * (1 / step) may be off it by rounding. The step that
# covers the largest value has that value at the end, and must find it there.
_AT_END = 2.0**-22


def rsq_quantize(
    x: Float[Array, "..."],
    step: Float[Array, "..."] | float,
    *,
    bits: int | None = None,
    limit: int | tuple[int, int] | None = None,
    axis: int | None = None,
    gradient_scale: float = 1.0,
) -> Float[Array, "..."]:
    """Round `x` to multiples of `step` within a range of integers; half to even.

    Args:
      x: values, any shape, floating point.
      step: value of one integer, positive: a scalar; `[x.shape[axis]]` with `axis` (per channel);
        or of the rank of `x` with 1 where it does not vary (per tap and channel).
      bits: integers -(2**(bits-1) - 1) to 2**(bits-1) - 1, 2 to 16 bits; 8 if `limit` is not given.
      limit: instead of `bits`, the largest integer (range -limit to limit), or (low, high).
      axis: the axis of `x` that a one-dimensional `step` belongs to.
      gradient_scale: factor on the step's gradient; see `lsq_gradient_scale`.
    Returns: shape and dtype of `x`; computed in float32. NaN stays NaN, and an infinity saturates.
    Gradient: for `x` 1 within the range, its ends included, and 0 beyond; for `step` the rounding
      error within the range, and low or high at its ends and beyond (LSQ).
    Raises: TypeError if `x` is not floating point; ValueError for a step that does not fit or is
      known to be zero, negative or not finite, or for an impossible range.
    Example: multiples of 0.5 from -1 to 1.

      >>> rsq_quantize(jnp.array([0.3, 0.8, 5.0]), 0.5, limit=2).tolist()
      [0.5, 1.0, 1.0]
    """
    x = jnp.asarray(x)
    step = jnp.asarray(step, jnp.float32)
    low, high = _range(bits, limit)
    if axis is not None:
        if step.ndim != 1 or not -x.ndim <= axis < x.ndim or step.shape[0] != x.shape[axis]:
            raise ValueError(
                f"rsq_quantize: with axis={axis}, step must be one-dimensional and as long as that "
                f"axis of x; got step {step.shape} and x {x.shape}"
            )
        step = lax.expand_dims(step, [d for d in range(x.ndim) if d != axis % x.ndim])
    elif step.ndim == 0:
        step = step.reshape((1,) * x.ndim)
    check_steps("rsq_quantize", "step", step)
    params = {"low": low, "high": high, "gradient_scale": float(gradient_scale), "closed": False}
    _check(jax.typeof(x), jax.typeof(step), **params)
    return rsq_quantize_p.bind(x, step, **params)


def requantize(
    x: Float[Array, "..."], step: Float32[Array, "..."], limit: int
) -> Float[Array, "..."]:
    """`rsq_quantize` of values that may be integers of the step already, such as -limit or limit.

    At the ends those are not saturated, and move with `x` alone: the step's derivative is 0 there.
    """
    params = {"low": -limit, "high": limit, "gradient_scale": 1.0, "closed": True}
    return rsq_quantize_p.bind(x, step, **params)


def lsq_gradient_scale(size: int, limit: int) -> float:
    """LSQ's factor on a step's gradient, 1 / sqrt(size * limit) (section 2.2 of the paper).

    Args:
      size: how many values share one step.
      limit: the largest integer.
    Raises: ValueError unless both are positive.
    Example:

      >>> lsq_gradient_scale(4, 1)
      0.5
    """
    if size < 1 or limit < 1:
        raise ValueError(f"lsq_gradient_scale: size and limit are positive, got {size} and {limit}")
    return 1 / math.sqrt(size * limit)


def rounded(value: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same value, in a form that compilers keep as the float32 it is.

    XLA's backends contract a product and a sum into one rounding, and its simplifier turns
    quotients into products; either would make a result depend on the program around it. No
    compiler can know that the value is finite, so it cannot see through this minimum; an infinity
    is put back.
    """
    most = jnp.full_like(value, jnp.finfo(jnp.float32).max)
    return lax.select(value > most, value, lax.min(value, most))


def check_steps(function: str, argument: str, steps: Array) -> None:
    """Refuse steps that are known (not traced) and not positive and finite."""
    bad = count_where(lambda s: ~(jnp.isfinite(s) & (s > 0)), steps)
    if bad:
        raise ValueError(
            f"{function}: {argument} must be positive and finite; {bad} of {jnp.size(steps)} "
            f"{'is' if bad == 1 else 'are'} not"
        )


def _range(bits: int | None, limit: int | tuple[int, int] | None) -> tuple[int, int]:
    if bits is not None and limit is not None:
        raise ValueError(f"rsq_quantize: give bits or limit, not both ({bits} and {limit})")
    if limit is None:
        bits = 8 if bits is None else bits
        if not 2 <= bits <= 16:
            raise ValueError(f"rsq_quantize: bits must lie in 2..16, got {bits}")
        high = 2 ** (bits - 1) - 1
        low = -high
    else:
        low, high = limit if isinstance(limit, tuple) else (-limit, limit)
    if not (-_LARGEST_LIMIT <= low <= 0 <= high <= _LARGEST_LIMIT and low < high):
        raise ValueError(
            "rsq_quantize: limit must be a positive integer, or (low, high) around zero, "
            f"within 2**23; got {limit}"
        )
    return int(low), int(high)


def _reference(x, step, *, low, high, gradient_scale, closed):
    z = x.astype(jnp.float32) * rounded(1 / step)
    return (clamp(low, lax.round(z, _HALF_TO_EVEN), high) * step).astype(x.dtype)


_HALF_TO_EVEN = lax.RoundingMethod.TO_NEAREST_EVEN


def _check(x, step, *, low, high, gradient_scale, closed):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"rsq_quantize: x must be floating point, got {x.dtype}")
    fits = step.ndim == x.ndim and all(
        s == 1 or s == n for s, n in zip(step.shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            "rsq_quantize: step must be a scalar, or have the rank of x with 1 or x's size in each "
            f"axis (name the axis of a one-dimensional step by axis=); got step {step.shape} and "
            f"x {x.shape}"
        )


def _jvp(p, primals, tangents, *, low, high, gradient_scale, closed):
    x, step = primals
    dx, dstep = tangents
    out = p.bind(x, step, low=low, high=high, gradient_scale=gradient_scale, closed=closed)
    z = lax.stop_gradient(x.astype(jnp.float32) * rounded(1 / step))
    tangent = jnp.zeros_like(out)
    if type(dx) is not Zero:
        inside = (z >= low * (1 + _AT_END)) & (z <= high * (1 + _AT_END))
        tangent += jnp.where(inside, dx, jnp.zeros_like(dx))
    if type(dstep) is not Zero:
        integer = clamp(low, lax.round(z, _HALF_TO_EVEN), high)
        ends = 1 + _AT_END if closed else 1 - _AT_END
        inside = (z > low * ends) & (z < high * ends)
        slope = jnp.where(inside, integer - z, integer) * gradient_scale
        tangent += (slope * dstep).astype(out.dtype)
    return out, tangent


rsq_quantize_p = define("cm_rsq_quantize", _reference, check=_check, jvp=_jvp)


@cost_rule(rsq_quantize_p)
def _cost(x, step, *, out, mesh, low, high, gradient_scale, closed) -> Work:
    """Multiply, round, clip, multiply: four vector instructions per value."""
    return Work(vector_bytes=x.size * (4.0 * 4), flops=x.size * 4.0)
