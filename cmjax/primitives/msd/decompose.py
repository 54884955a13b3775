"""Multi-scale decomposition: a floating-point row as a few integer rows of falling weight.

    int8    u = 127 x / M,   a1 = round(u),   a2 = round(254 (u - a1)),   M = max |x|
            x ~ (M / 127) (a1 + a2 / 254),                        error <= M / 64516
    mxfp4   blocks of 32,   alpha = 2**ceil(log2 max |x|),   s1 = alpha / 4,   s2 = s1 / 8
            x ~ s1 p1 + s2 p2,   p in E2M1,                       error <= alpha / 64

Zheng et al., "Multi-Scale Dequant: Eliminating Dequantization Bottleneck via Activation
Decomposition for Efficient LLM Inference", arXiv 2605.13915, give the two bounds. The constants 127
and 254 and the rounding of ties away from zero are those of the vendor's operator
(`grouped_matmul_antiquant_a16w8_msd.h` in Huawei's open CANN sources); 254 is the largest factor at
which the second part cannot clip, as |u - a1| <= 1/2. The MXFP4 scales are derived here: they meet
the paper's bound and its 6.6 effective bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from cmjax.primitives.define import clamp, count_where, define
from cmjax.primitives.msd import mxfp4
from cmjax.primitives.msd.mxfp4 import Rounding, round_to_e2m1, round_to_integer
from cmjax.primitives.msd.weight import SMALLEST, WeightFormat, check_format
from cmjax.program import Work, cost_rule

STEP = {"int8": 254, "mxfp4": 8}
"""Ratio of the weights of one part and the next."""
MOST_PASSES = {"int8": 3, "mxfp4": 2}
FLOATS = ("float32", "bfloat16", "float16")


class Decomposed(NamedTuple):
    """x ~ scale * (parts[0] + parts[1] / c + parts[2] / c**2), with c = `STEP[format]`."""

    parts: Int8[Array, "passes *shape"]  # int8: within +-127; mxfp4: half-steps 2 * E2M1, +-8
    scale: Float32[Array, "*lead groups"]  # int8: M / 127; mxfp4: s1 / 2, a power of two


def msd_decompose(
    x: Float[Array, "*shape"],
    *,
    passes: int = 2,
    format: WeightFormat = "int8",
    axis: int = -1,
    group_size: int | None = None,
    rounding: Rounding = "away",
) -> Decomposed:
    """Split `x` into `passes` low-precision parts, all arithmetic in float32.

    Args:
      x: float32, bfloat16 or float16; any shape of at least one axis.
      passes: parts; 1 to 3 for int8 (float32 is exhausted at three), 1 or 2 for mxfp4.
      format: "int8" or "mxfp4".
      axis: the axis that will be contracted; maxima are taken along it.
      group_size: elements along `axis` that share a maximum; `None` for all of them in int8, and
        32 in mxfp4.
      rounding: ties "away" from zero, as the vendor's operator rounds, or to "even". The bound is
        the same.
    Returns: `Decomposed`; `parts[i]` has the shape of `x`, and `scale` that of `x` with one entry
      per group along `axis` (1 for a whole row).
    A group whose maximum is under 2**-100 counts as zero: parts and scale are 0. A group with an
    infinity or NaN has parts 0 and scale NaN.
    Errors are at most M / (254 * 254**(passes - 1)); in mxfp4 alpha / 64 (two passes), alpha / 8.
    Gradient: that of the scale; the parts are integers and have none.
    Raises: ValueError, TypeError: bad arguments; an infinity or NaN in a concrete `x`.
    Source: Zheng et al., arXiv:2605.13915, and the formulas of this module.
    Example: two int8 parts hold a value to 16 bits.

      >>> x = jnp.array([1.0, 0.3, -0.7])
      >>> (first, second), scale = msd_decompose(x)
      >>> first.tolist(), second.tolist()
      ([127, 38, -89], [0, 25, 25])
      >>> bool(jnp.abs(scale * (first + second / 254) - x).max() < 1 / 64516)
      True
    """
    check_activations("msd_decompose", x)
    check_finite("msd_decompose", "x", x)
    x = jnp.asarray(x)
    if x.ndim == 0 or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"msd_decompose: x has {x.ndim} axes, there is no axis {axis}")
    params = {
        "passes": passes,
        "format": format,
        "group_size": group_size,
        "rounding": rounding,
    }
    moved = jnp.moveaxis(x, axis, -1)
    _check(jax.typeof(moved), **params)
    parts, scale = msd_decompose_p.bind(moved, **params)
    place = axis % x.ndim
    return Decomposed(jnp.moveaxis(parts, -1, place + 1), jnp.moveaxis(scale, -1, place))


def split_int8(x: Float32[Array, "*lead k"], passes: int, rounding: Rounding):
    """The int8 parts of each row, a list of int8 `[*lead, k]`, and M, `[*lead]` (NaN, or 0)."""
    top = jnp.max(jnp.abs(x), axis=-1)
    top = jnp.where(top < SMALLEST, 0, top)
    good = jnp.isfinite(top) & (top > 0)
    inverse = jnp.where(good, 127 / jnp.where(good, top, 1), 0)[..., None]
    # The clamps hold in exact arithmetic. They keep the compiler from fusing x * inverse - a1 into
    # one operation, so that every backend rounds alike.
    rest = clamp(-127.0, jnp.where(good[..., None], x, 0) * inverse, 127.0)
    parts = []
    for _ in range(passes):
        part = round_to_integer(rest, rounding)
        parts.append(part.astype(jnp.int8))
        rest = clamp(-127.0, 254 * (rest - part), 127.0)
    return parts, jnp.where(jnp.isfinite(top), top, jnp.nan)


def split_mxfp4(x: Float32[Array, "*lead k"], passes: int, rounding: Rounding):
    """The half-steps of each row, a list of int8 `[*lead, k]`, and s1 / 2, `[*lead, k // 32]`.

    No step rounds but the two that are meant to: scales are powers of two.
    """
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // mxfp4.BLOCK, mxfp4.BLOCK)
    top = jnp.max(jnp.abs(blocks), axis=-1)
    good = jnp.isfinite(top) & (top >= SMALLEST)
    exponent = mxfp4.ceil_log2(jnp.where(good, top, 1))
    up = mxfp4.power_of_two(3 - exponent)[..., None]  # 2 x / s1 = 8 x / alpha
    rest = jnp.where(good[..., None], blocks, 0) * up
    parts = []
    for _ in range(passes):
        part = round_to_e2m1(rest, rounding)
        parts.append(part.astype(jnp.int8).reshape(x.shape))
        rest = 8 * (rest - part)
    scale = jnp.where(good, mxfp4.power_of_two(exponent - 3), 0)
    return parts, jnp.where(jnp.isfinite(top), scale, jnp.nan)


def round_mxfp4(x: Float32[Array, "*lead k"], passes: int, rounding: Rounding) -> Array:
    """x as its mxfp4 parts say: few bits times a power of two, so that its products with MXFP4
    values are exact in float32."""
    parts, unit = split_mxfp4(x, passes, rounding)
    steps = parts[0].astype(jnp.float32)
    for i, part in enumerate(parts[1:], 1):
        steps = steps + part.astype(jnp.float32) * float(8**-i)
    return (steps.reshape(*unit.shape, mxfp4.BLOCK) * unit[..., None]).reshape(x.shape)


def check_activations(what: str, x) -> None:
    """TypeError unless `x` is float32, bfloat16 or float16."""
    dtype = jnp.result_type(x)
    if dtype.name not in FLOATS:
        raise TypeError(f"{what}: x must be {', '.join(FLOATS)}, got {dtype}")


def check_finite(what: str, name: str, x) -> None:
    """ValueError if `x` holds an infinity or NaN, where its values are known."""
    if count_where(lambda v: ~jnp.isfinite(v), x):
        raise ValueError(
            f"{what}: {name} holds infinities or NaN, which have no decomposition; under jit they "
            "would turn the results they enter into NaN"
        )


def check_passes(what: str, passes, format: str, rounding: str) -> None:
    """ValueError for a number of passes, format or rounding that does not exist."""
    check_format(what, format)
    if passes not in range(1, MOST_PASSES[format] + 1):
        most = MOST_PASSES[format]
        raise ValueError(f"{what}: passes must be 1 to {most} for {format}, got {passes!r}")
    if rounding not in ("away", "even"):
        raise ValueError(f'{what}: rounding must be "away" or "even", got {rounding!r}')


def _reference(x, *, passes, format, group_size, rounding):
    x = x.astype(jnp.float32)
    if format == "mxfp4":
        parts, scale = split_mxfp4(x, passes, rounding)
    else:
        size = group_size or x.shape[-1]
        groups = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
        parts, top = split_int8(groups, passes, rounding)
        parts = [part.reshape(x.shape) for part in parts]
        scale = top * jnp.float32(1 / 127)
    return [jnp.stack(parts), scale]


def _check(x, *, passes, format, group_size, rounding):
    check_passes("msd_decompose", passes, format, rounding)
    if format == "mxfp4" and group_size not in (None, mxfp4.BLOCK):
        raise ValueError(
            f"msd_decompose: the blocks of mxfp4 have 32 values, got group_size={group_size}"
        )
    length = x.shape[-1]
    size = mxfp4.BLOCK if format == "mxfp4" else length if group_size is None else group_size
    if size < 1 or length < 1 or length % size:
        raise ValueError(
            f"msd_decompose: the axis has {length} values, which must be a positive multiple of "
            f"the group size, {size}"
        )


def _batch(args, dims, **params):
    """A mapped axis becomes a leading one of x; of the parts it is then the second."""
    (x,), (dim,) = args, dims
    return msd_decompose_p.bind(jnp.moveaxis(x, dim, 0), **params), [1, 0]


msd_decompose_p = define(
    "cm_msd_decompose", _reference, check=_check, batch=_batch, multiple_results=True
)


def decompose_instructions(passes: int) -> float:
    """Vector instructions per element, in float32: cast, |x|, running maximum and scaling, then
    for each part round, narrow, and (but for the last) subtract and scale."""
    return 4.0 + 4.0 * passes - 2.0


@cost_rule(msd_decompose_p)
def _cost(x, *, out, mesh, passes, format, group_size, rounding) -> Work:
    """One kernel: a row is read once and stays in the vector core's buffer."""
    instructions = decompose_instructions(passes)
    return Work(vector_bytes=x.size * (4 * instructions), flops=x.size * instructions)
