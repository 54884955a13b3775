"""W4A8: int8 rows by int4 matrices, in integers, with a scale per group of inner elements.

    y[r, n] = sum over groups g of scale[g, n] * sum over k in g of x[r, k] * w[k, n]

The kernel is CANN's grouped matmul of A8W4: an int8 row is taken as two int4 parts, x = 16 a + b,
both of which the cube multiplies with the int4 matrix at twice the 8-bit rate (multi-scale
decomposition). So the matrix is read in four bits and never dequantized, and a product takes as
long as one of 8 bits. Two values lie in a byte, the earlier one in the low four bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32, UInt8

from cmjax.primitives.define import define
from cmjax.primitives.grouped import grouped_dot
from cmjax.program import Work, cost_rule, matmul_flops
from cmjax.program.work import of_stack

GROUP = 256
"""Inner elements that share a scale; a narrower matrix has one group."""
_MOST = 7
_TINY = 1e-12


class Int4Weight(NamedTuple):
    """A matrix, or a stack of them, in four bits."""

    packed: UInt8[Array, "*stack half_k n"]
    scale: Float32[Array, "*stack groups n"]


def group_size(inner: int) -> int:
    """Inner elements that share a scale.

    Raises: ValueError: whole groups do not fill `inner`, or it is odd.
    """
    size = min(GROUP, inner)
    if inner < 2 or inner % size or size % 2:
        raise ValueError(
            f"int4: the inner dimension must be a multiple of {GROUP}, or even and below, "
            f"got {inner}"
        )
    return size


def quantize_int4(w: Float[Array, "*stack k n"]) -> Int4Weight:
    """Round a matrix to int4, -7 to 7, with a scale per group of inner elements and output.

    Args:
      w: floating point.
    Raises: ValueError: see `group_size`.
    Source: symmetric per-group rounding, as W4A8 checkpoints for Ascend have it (groups of 256).

    >>> packed, scale = quantize_int4(jnp.array([[7.0], [-3.4]]))
    >>> unpack_int4(packed).tolist(), scale.tolist()
    ([[7], [-3]], [[1.0]])
    """
    *stack, inner, outputs = w.shape
    size = group_size(inner)
    grouped = w.astype(jnp.float32).reshape(*stack, inner // size, size, outputs)
    scale = jnp.maximum(jnp.max(jnp.abs(grouped), axis=-2), _TINY) / _MOST
    steps = jnp.round(grouped / scale[..., None, :]).astype(jnp.int8).reshape(w.shape)
    return Int4Weight(pack_int4(steps), scale)


def pack_int4(steps: Int8[Array, "*stack k n"]) -> UInt8[Array, "*stack half_k n"]:
    """Two values of -8 to 7 a byte, of neighbouring rows."""
    codes = steps.astype(jnp.uint8) & 15
    return codes[..., 0::2, :] | (codes[..., 1::2, :] << 4)


def unpack_int4(packed: UInt8[Array, "*stack half_k n"]) -> Int8[Array, "*stack k n"]:
    """The values of packed bytes."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-2)
    shape = (*packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1])
    codes = codes.reshape(shape).astype(jnp.int8)
    return jnp.where(codes > _MOST, codes - 16, codes).astype(jnp.int8)


def int4_dot(
    x: Int8[Array, "*stack rows k"], weight: Int4Weight
) -> Float32[Array, "*stack rows n"]:
    """Rows by the matrix of their place in the stack.

    Args:
      x: int8 steps. weight: of `quantize_int4`.
    Gradient: none; x and the matrix are integers.
    Raises: ValueError, TypeError: shapes or dtypes that do not fit each other.

    >>> x = jnp.array([[2, 1]], jnp.int8)
    >>> int4_dot(x, quantize_int4(jnp.array([[7.0], [-3.0]]))).tolist()
    [[11.0]]
    """
    _check(*map(jax.typeof, (x, *weight)))
    return int4_dot_p.bind(x, *weight)


def grouped_int4_dot(
    x: Int8[Array, "rows k"], weight: Int4Weight, sizes: Int32[Array, "stack"]
) -> Float32[Array, "rows n"]:
    """Rows sorted by the matrix that they meet, `sizes` of them each; see `grouped_dot`."""
    stack, groups, outputs = weight.scale.shape
    size = x.shape[-1] // groups
    steps = unpack_int4(weight.packed).reshape(stack, groups, size, outputs)
    of_row = jnp.repeat(jnp.arange(stack, dtype=jnp.int32), sizes, total_repeat_length=x.shape[0])
    total = jnp.zeros((x.shape[0], outputs), jnp.float32)
    for g in range(groups):
        part = grouped_dot(x[:, g * size : (g + 1) * size], steps[:, g], sizes)
        total = total + part.astype(jnp.float32) * weight.scale[of_row, g]
    return total


def _reference(x, packed, scale):
    *lead, rows, inner = x.shape
    groups = scale.shape[-2]
    size = inner // groups
    w = unpack_int4(packed).reshape(*lead, groups, size, packed.shape[-1])
    x = jnp.moveaxis(x.reshape(*lead, rows, groups, size), -2, -3)
    axes = tuple(range(len(lead) + 1))
    contract = (((x.ndim - 1,), (w.ndim - 2,)), (axes, axes))
    parts = lax.dot_general(x, w, contract, preferred_element_type=jnp.int32)
    return jnp.sum(parts.astype(jnp.float32) * scale[..., :, None, :], axis=-3)


def _check(x, packed, scale):
    if x.dtype != jnp.int8 or packed.dtype != jnp.uint8:
        raise TypeError(
            f"int4_dot: x must be int8 and the matrix packed in uint8, got {x.dtype} and "
            f"{packed.dtype}"
        )
    inner = 2 * packed.shape[-2]
    if x.shape[:-2] != packed.shape[:-2] or x.shape[-1] != inner or scale.shape[-2] < 1:
        raise ValueError(
            f"int4_dot: x must be [*stack, rows, {inner}] with the stack "
            f"{list(packed.shape[:-2])} of the matrix, got {list(x.shape)}"
        )
    if inner % scale.shape[-2] or scale.shape != (
        *packed.shape[:-2],
        scale.shape[-2],
        packed.shape[-1],
    ):
        raise ValueError(
            f"int4_dot: scale must be [*stack, groups, {packed.shape[-1]}] with groups that divide "
            f"{inner}, got {list(scale.shape)}"
        )


int4_dot_p = define("cm_int4_dot", _reference, check=_check)


@cost_rule(int4_dot_p)
def _cost(x, packed, scale, *, out, **_) -> Work:
    """Two passes at twice the 8-bit rate; the vector cores split the rows and add the groups up.
    Of a stack the kernel skips matrices without rows."""
    flops = out[0].size * x.shape[-1] * 2.0
    groups = scale.shape[-2]
    return Work(
        flops=flops * 2.0,
        vector_bytes=x.size * 3.0 + out[0].size * groups * 8.0,
        **matmul_flops(jnp.int8, flops, x.shape[-1]),
        **of_stack(x, packed),
    )
