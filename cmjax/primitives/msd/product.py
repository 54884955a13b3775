"""Matrix products with INT8 or MXFP4 weights that are never dequantized (W8A16, W4A16).

    int8, two passes    y = (M / 127) (a1 @ q.T + a2 @ q.T / 254) * scale + bias
    mxfp4, two passes   y = sum over blocks of (s1 p1 . w + s2 p2 . w) sw + bias

Each row x of activations is split into low-precision parts (`msd_decompose`), each is multiplied
with the quantized weights in integers, and the results are recombined: Zheng et al., arXiv
2605.13915. The int8 recombination, with offset and bias, is that of the vendor's operator
(`grouped_matmul_antiquant_a16w8_msd.h` in Huawei's open CANN sources).

Two parts make *one* integer, 254 a1 + a2, so the sum T = 254 c1 + c2 is formed exactly and rounded
to float32 once. Its value depends on no order of summation: XLA and the kernels give equal bits.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, UInt8

from cmjax import native
from cmjax.primitives.define import clamp, count_where, define, straight_through
from cmjax.primitives.msd import mxfp4
from cmjax.primitives.msd.decompose import (
    check_activations,
    check_finite,
    check_passes,
    decompose_instructions,
    round_mxfp4,
    split_int8,
)
from cmjax.primitives.msd.mxfp4 import Rounding
from cmjax.primitives.msd.weight import QuantizedWeight, WeightFormat, dequantize
from cmjax.program import Work, cost_rule, matmul_flops
from cmjax.program.work import of_stack

MOST_INNER = (2**31 - 1) // (127 * 128)
"""Longest row, 132,104, whose int8 products cannot overflow an int32 sum."""
_LARGE = np.float32(2.0**100)  # times a sum over the longest row it is still a float32


def msd_dot(
    x: Float[Array, "*rows k"],
    w: Int8[Array, "n k"] | UInt8[Array, "n k//2"] | QuantizedWeight,
    *,
    w_scale: Float32[Array, "n"]
    | Float32[Array, "n groups"]
    | UInt8[Array, "n k//32"]
    | None = None,
    format: WeightFormat = "int8",
    passes: int = 2,
    group_size: int | None = None,
    offset: Float32[Array, "n"] | Float32[Array, "n groups"] | None = None,
    bias: Float[Array, "n"] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "away",
) -> Float[Array, "*rows n"]:
    """`x @ W.T + bias` for few-bit weights, with x split into parts instead of W dequantized.

    Args:
      x: activations, float32, bfloat16 or float16.
      w: weights `[features, inner]`, that is with the contracted dimension *last*: int8, or for
        mxfp4 two codes per byte. Or a `QuantizedWeight`, which brings `w_scale`, `format`,
        `group_size` and `offset` with it.
      w_scale: value of one int8 step, per feature or per feature and group; for mxfp4 the E8M0
        exponents.
      format: "int8" (W8A16) or "mxfp4" (W4A16).
      passes: parts of x. int8: 1 (W8A8), 2 (error of x at most M / 64516, M the row's maximum) or
        3. mxfp4: 1 or 2 (alpha / 64, alpha the block's maximum rounded up to a power of two).
      group_size: inner elements per scale; `None` for one scale per feature (32 in mxfp4). With
        groups, M is the group's maximum.
      offset: int8 only, in steps, of the shape of `w_scale`: W = w_scale * (w + offset). It
        multiplies the sum of the parts, which is an exact integer (the vendor's operator sums x).
      bias: added in float32.
      out_dtype: floating point; the dtype of x by default. There is one cast, at the end.
      rounding: see `msd_decompose`.
    Gradient: straight-through, that of the exact `x @ W.T + bias`, for x, w_scale (int8), offset
      and bias; w has none.
    Under `jit`, a row of x with an infinity or NaN gives a row of NaN. A result beyond float32
    saturates at its largest number, and nothing does on the way to one that fits (in mxfp4, with
    weights up to 2**10).
    Rows (mxfp4: blocks) whose maximum is under 2**-100 count as 0.
    Raises: ValueError, TypeError: shapes or dtypes that do not fit; rows longer than 132,104 (int32
      would overflow); and where the values are known, an infinity or NaN in x and a scale that is
      not positive and finite.
    Source: Zheng et al., arXiv:2605.13915, and the formulas of this module.
    Example:

      >>> from cmjax.primitives.msd.weight import quantize_weight
      >>> w = jnp.array([[127.0, -63.0, 0.0], [254.0, 2.0, 4.0]])
      >>> y = msd_dot(jnp.array([[1.0, 2.0, 3.0]]), quantize_weight(w))
      >>> y.shape, y.round(1).tolist()
      ((1, 2), [[1.0, 270.0]])
    """
    if isinstance(w, QuantizedWeight):
        if w_scale is not None or offset is not None or group_size is not None:
            raise ValueError(
                "msd_dot: w is a QuantizedWeight, which has w_scale, group_size and offset; do not "
                "give them again"
            )
        w_scale, offset, format, group_size = w.scale, w.offset, w.format, w.group_size
        w = w.values
    elif w_scale is None:
        raise ValueError("msd_dot: w_scale is needed, one per row of w, or a QuantizedWeight as w")
    check_activations("msd_dot", x)
    check_passes("msd_dot", passes, format, rounding)
    check_finite("msd_dot", "x", x)
    _check_scale(w_scale, format)
    x = jnp.asarray(x)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    params = {
        "format": format,
        "passes": passes,
        "group_size": mxfp4.BLOCK if format == "mxfp4" and group_size is None else group_size,
        "has_offset": offset is not None,
        "out_dtype": out_dtype.name,
        "rounding": rounding,
    }
    operands = [x, w, w_scale, *(() if offset is None else (offset,))]
    if bias is not None:
        operands.append(jnp.asarray(bias).astype(jnp.float32))
    operands = [jnp.asarray(a) for a in operands]
    _check(*map(jax.typeof, operands), **params)
    return msd_dot_p.bind(*operands, **params)


def float_of_total(c1: Array, c2: Array) -> Float32[Array, "..."]:
    """254 c1 + c2 of two int32, rounded to float32 once, to nearest.

    The sum needs up to 40 bits. It is split into multiples of 2**16 and a rest under 2**17, both
    exact in float32, so the one addition is the one rounding (fused or not).
    """
    high = 254 * (c1 >> 8) + (c2 >> 8)
    low = 254 * (c1 & 255) + (c2 & 255)
    low = low + ((high & 255) << 8)
    return (high >> 8).astype(jnp.float32) * 65536.0 + low.astype(jnp.float32)


def _reference(x, w, w_scale, *rest, format, passes, group_size, has_offset, out_dtype, rounding):
    offset, bias = _optional(rest, has_offset)
    x = x.astype(jnp.float32)
    if format == "mxfp4":
        y = _with_headroom(lambda x: _mxfp4_product(x, w, w_scale, passes, rounding), x)
    elif w_scale.ndim < w.ndim:
        y = _int8_product(x, w, w_scale, offset, passes, rounding)
    else:
        y = _grouped_product(x, w, w_scale, offset, passes, rounding)
    y = _rounded(y)
    if bias is not None:
        y = _rounded(y + _over_rows(bias, y))
    return y.astype(out_dtype)


def _int8_product(x, w, scale, offset, passes, rounding):
    """One group: integer sums of every part, then float32."""
    stack = w.ndim - 2
    parts, top = split_int8(x, passes, rounding)
    stacked = jnp.stack(parts, axis=stack)  # one product reads the weights once for all parts
    lead = tuple(range(stack))
    contract = (((stacked.ndim - 1,), (w.ndim - 1,)), (lead, lead))
    sums = lax.dot_general(stacked, w, contract, preferred_element_type=jnp.int32)
    total, unit = recombined([lax.index_in_dim(sums, i, stack, False) for i in range(passes)])
    shrunk, factor = _headroom(top)
    row = (shrunk * unit)[..., None]
    y = total * row
    if offset is not None:
        whole, _ = recombined([jnp.sum(p, axis=-1, keepdims=True, dtype=jnp.int32) for p in parts])
        y = _rounded(y) + _rounded(_over_rows(offset, y) * (whole * row))
    return (y * _over_rows(scale, y)) * factor[..., None]


def _headroom(top):
    """M and a factor: 1, or where sums of M could overflow before they are scaled, 2**64 for the
    M / 2**64 that is then put in its place. Products with powers of two round nothing."""
    large = top >= _LARGE
    return jnp.where(large, top * 2.0**-64, top), jnp.where(large, np.float32(2.0**64), 1)


def _with_headroom(
    product: Callable[[Array], Float32[Array, "*rows n"]], x: Float32[Array, "*rows k"]
) -> Float32[Array, "*rows n"]:
    """`product(x)`, saturated at float32's largest number.

    Rows whose sums could overflow before they meet their scale go through it as x / 2**64. NaN is
    not large: its row comes out as NaN whatever it is multiplied with.
    """
    factor = _headroom(jnp.max(jnp.abs(x), axis=-1, keepdims=True))[1]
    return _rounded(product(jnp.where(factor == 1, x, x * 2.0**-64)) * factor)


def _grouped_product(x, w, scale, offset, passes, rounding):
    """Group after group, added in float32 in their order."""
    groups = scale.shape[-1]

    def by_group(a):  # [..., inner] -> [groups, ..., group size]
        return jnp.moveaxis(a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups), -2, 0)

    offsets = () if offset is None else (jnp.moveaxis(offset, -1, 0),)
    operands = (by_group(x), by_group(w), jnp.moveaxis(scale, -1, 0), *offsets)

    def one(x, w, scale, *offset):
        return _rounded(_int8_product(x, w, scale, offset[0] if offset else None, passes, rounding))

    first = one(*(a[0] for a in operands))
    rest = tuple(a[1:] for a in operands)
    return lax.scan(lambda y, group: (y + one(*group), None), first, rest)[0]


def _mxfp4_product(x, w, scale, passes, rounding):
    """Every factor has few bits and a power of two, so only the sums round, in float32."""
    rows = round_mxfp4(x, passes, rounding)
    lead = tuple(range(w.ndim - 2))
    contract = (((rows.ndim - 1,), (w.ndim - 1,)), (lead, lead))
    values = dequantize(w, scale, None, "mxfp4")
    return lax.dot_general(rows, values, contract, precision=lax.Precision.HIGHEST)


def recombined(sums):
    """(total, unit): the sums of all parts in float32, and their value at M = 1."""
    if len(sums) == 1:
        return sums[0].astype(jnp.float32), np.float32(1 / 127)
    total, unit = float_of_total(sums[0], sums[1]), np.float32(1 / (127 * 254))
    if len(sums) == 3:
        total = total + sums[2].astype(jnp.float32) * np.float32(1 / 254)
    return total, unit


def _rounded(y):
    """`y`, as a value that has been rounded: compilers do not fuse this product with a sum.

    Also saturates, so that an overflow does not become inf - inf.
    """
    largest = jnp.finfo(jnp.float32).max
    return clamp(-largest, y, largest)


def _over_rows(per_feature, y):
    """`[*stack, n]` beside `[*stack, *rows, n]`."""
    lead, n = per_feature.shape[:-1], per_feature.shape[-1]
    return per_feature.reshape(*lead, *[1] * (y.ndim - len(lead) - 1), n)


def _optional(rest, has_offset):
    offset = rest[0] if has_offset else None
    bias = rest[has_offset] if len(rest) > has_offset else None
    return offset, bias


def _native(x, w, w_scale, *rest, format, passes, group_size, has_offset, out_dtype, rounding):
    """The kernels serve two passes, ties away from zero, and one int8 scale per feature."""
    if passes != 2 or rounding != "away" or (format == "int8" and group_size is not None):
        return _reference(
            x,
            w,
            w_scale,
            *rest,
            format=format,
            passes=passes,
            group_size=group_size,
            has_offset=has_offset,
            out_dtype=out_dtype,
            rounding=rounding,
        )
    offset, bias = _optional(rest, has_offset)
    lead, features = w.shape[:-2], w.shape[-2]
    stack, rows = math.prod(lead), math.prod(x.shape[len(lead) : -1])

    def flat(a, *shape):
        return a.reshape(stack, *shape)

    kept = _kernel_dtype(x, bias, out_dtype)
    x = x.astype(kept)
    weights = (
        flat(w, features, w.shape[-1]),
        flat(w_scale, features, w_scale.shape[-1] if format == "mxfp4" else 1),
    )

    out = jax.ShapeDtypeStruct((stack, rows, features), kept)
    offsets = jnp.zeros((0,), jnp.float32) if offset is None else offset.reshape(-1)
    rest = () if format == "mxfp4" else (offsets,)
    y = native.call(f"cmjax_msd_{format}", out, flat(x, rows, x.shape[-1]), *weights, *rest)
    y = y.reshape(*x.shape[:-1], features)
    if bias is not None:
        y = _rounded(y + _over_rows(bias, y))
    return y.astype(out_dtype)


def _kernel_dtype(x, bias, out_dtype):
    """The kernels take and give float32, or bfloat16 where nothing is added before rounding."""
    same = x.dtype == jnp.bfloat16 and out_dtype == "bfloat16" and bias is None
    return jnp.bfloat16 if same else jnp.float32


def _check(x, w, w_scale, *rest, format, passes, group_size, has_offset, out_dtype, rounding):
    offset, bias = _optional(rest, has_offset)
    wanted, codes = (jnp.uint8, 2) if format == "mxfp4" else (jnp.int8, 1)
    if w.ndim < 2 or w.dtype != wanted:
        raise TypeError(
            f"msd_dot: w must be {jnp.dtype(wanted).name} [features, inner"
            f"{' // 2' * (codes == 2)}] for {format}, got {w.dtype}{list(w.shape)}"
        )
    stack, features, inner = w.shape[:-2], w.shape[-2], codes * w.shape[-1]
    if x.ndim < 1 + len(stack) or x.shape[: len(stack)] != stack or x.shape[-1] != inner:
        raise ValueError(
            f"msd_dot: x must end in the {inner} inner elements of w, got {list(x.shape)}; is w "
            "stored [features, inner]?"
        )
    if x.shape[-1] < 1:
        raise ValueError("msd_dot: x has no elements to contract")
    groups = ()
    if group_size is not None:
        if format == "mxfp4" and group_size != mxfp4.BLOCK:
            raise ValueError(
                f"msd_dot: the blocks of mxfp4 have 32 values, got group_size={group_size}"
            )
        if group_size < 1 or inner % group_size:
            raise ValueError(
                f"msd_dot: the inner dimension {inner} must be a multiple of group_size, got "
                f"{group_size}"
            )
        groups = (inner // group_size,)
    scale_dtype = jnp.dtype(jnp.uint8 if format == "mxfp4" else jnp.float32)
    named = [("w_scale", w_scale, scale_dtype), ("offset", offset, jnp.dtype(jnp.float32))]
    for name, given, dtype in named:
        wanted_shape = (*stack, features, *groups)
        if given is not None and (given.shape != wanted_shape or given.dtype != dtype):
            raise ValueError(
                f"msd_dot: {name} must be {dtype}{list(wanted_shape)} for these weights and "
                f"group_size={group_size}, got {given.dtype}{list(given.shape)}"
            )
    if offset is not None and format == "mxfp4":
        raise ValueError("msd_dot: mxfp4 weights have no offset; use int8")
    if bias is not None and bias.shape != (*stack, features):
        raise ValueError(f"msd_dot: bias must be [{features}], got {list(bias.shape)}")
    longest = inner if group_size is None else group_size
    if format == "int8" and isinstance(longest, int) and longest > MOST_INNER:
        raise ValueError(
            f"msd_dot: {longest} products of int8 could overflow an int32 sum; the longest safe "
            f"row is {MOST_INNER}; use group_size, or split the row"
        )
    if not jnp.issubdtype(jnp.dtype(out_dtype), jnp.floating):
        raise TypeError(f"msd_dot: out_dtype must be floating point, got {out_dtype}")


def _check_scale(w_scale, format):
    if format == "mxfp4":
        bad, message = lambda s: s == 255, "w_scale holds 255, the NaN of E8M0"
    else:
        bad = lambda s: ~(jnp.isfinite(s) & (s > 0))  # noqa: E731
        message = "every w_scale must be positive and finite"
    if count := count_where(bad, w_scale):
        raise ValueError(f"msd_dot: {message}; {count} of {jnp.size(w_scale)} are not")


def _exact(x, w, w_scale, *rest, format, has_offset, out_dtype):
    """The product with dequantized weights, whose derivative stands for the rounded one's."""
    offset, bias = _optional(rest, has_offset)
    values = dequantize(w, w_scale, offset, format)
    lead = tuple(range(w.ndim - 2))
    contract = (((x.ndim - 1,), (w.ndim - 1,)), (lead, lead))
    y = lax.dot_general(x.astype(jnp.float32), values, contract)
    return (y if bias is None else y + _over_rows(bias, y)).astype(out_dtype)


def _jvp(p, primals, tangents, **params):
    kept = {key: params[key] for key in ("format", "has_offset", "out_dtype")}
    return straight_through(functools.partial(_exact, **kept), p, primals, tangents, params)


def _batch(args, dims, **params):
    """Mapped activations are more rows: the weights are read once. Mapped weights are a stack."""
    x, w, *others = args
    stack = w.ndim - 2
    if all(d is None for d in dims[1:]):
        return msd_dot_p.bind(jnp.moveaxis(x, dims[0], stack), w, *others, **params), stack
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    moved = (
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    )
    return msd_dot_p.bind(*moved, **params), 0


msd_dot_p = define("cm_msd_dot", _reference, check=_check, jvp=_jvp, batch=_batch, native=_native)


def recombine_instructions(passes: int) -> float:
    """Vector instructions per result: for each part a cast and a multiply-add, then the row's and
    the feature's scale and the cast to the result's dtype."""
    return 2.0 * passes + 3.0


@cost_rule(msd_dot_p)
def _cost(x, w, *others, out, mesh, format, passes, **_) -> Work:
    """One kernel. Both parts' rows go through the cube together, so the weights are read once; the
    parts and the integer sums stay on chip. Of a stack it skips matrices without rows.

    MXFP4 runs at twice the 8-bit rate (that of chips with 4-bit matrix units, which the 910C does
    not have), so two of its passes cost one of 8 bits.
    """
    inner = x.shape[-1]
    products = (out[0].size * inner) * (2.0 * passes)
    vector = x.size * decompose_instructions(passes) + out[0].size * recombine_instructions(passes)
    return Work(
        flops=products,
        vector_bytes=vector * 4.0,
        **matmul_flops(jnp.int8, products * (0.5 if format == "mxfp4" else 1.0), inner),
        **of_stack(x, w),
    )
