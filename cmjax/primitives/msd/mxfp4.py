"""MXFP4: 4-bit floats (E2M1) in blocks of 32 values that share a power-of-two scale (E8M0).

    value = 2**(exponent - 127) * E2M1(code),      |E2M1| in {0, 0.5, 1, 1.5, 2, 3, 4, 6}

OCP Microscaling Formats (MX) Specification v1.0, sections 5.2 and 6. A code is sign << 3 | index
into that list. Two codes lie in a byte, the earlier one in the low four bits, so a matrix takes
half a byte per value and one byte per block. Arithmetic here is in *half-steps*, the integers
2 * E2M1: they and their products are exact in int8 and int32.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int8, Int32, UInt8

BLOCK = 32
BIAS = 127
_HALF_STEPS = (0, 1, 2, 3, 4, 6, 8, 12)

Rounding = Literal["away", "even"]


def round_to_e2m1(v: Float32[Array, "..."], rounding: Rounding) -> Float32[Array, "..."]:
    """Nearest half-step to `v`, which must lie in [-12, 12]; ties away from zero, or to even codes.

    Between 0 and 4 half-steps every integer is a code, then 6 and 8, then 12.
    """
    size = jnp.abs(v)
    step = jnp.where(size <= 4, 1.0, jnp.where(size <= 8, 2.0, 4.0)).astype(jnp.float32)
    return round_to_integer(v / step, rounding) * step


def round_to_integer(v: Float32[Array, "..."], rounding: Rounding) -> Float32[Array, "..."]:
    """Nearest integer, ties away from zero or to even."""
    away = rounding == "away"
    method = lax.RoundingMethod.AWAY_FROM_ZERO if away else lax.RoundingMethod.TO_NEAREST_EVEN
    return lax.round(v, method)


def pack(half_steps: Int8[Array, "*lead k"]) -> UInt8[Array, "*lead k//2"]:
    """Two codes per byte. Every value must be a half-step of E2M1; `k` is even."""
    size = jnp.abs(half_steps.astype(jnp.int32))
    index = jnp.where(size <= 4, size, jnp.where(size == 6, 5, jnp.where(size == 8, 6, 7)))
    code = jnp.where(half_steps < 0, index + 8, index).astype(jnp.uint8)
    code = lax.optimization_barrier(code)  # XLA would compute both halves value by value
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack(packed: UInt8[Array, "*lead bytes"]) -> Int8[Array, "*lead 2*bytes"]:
    """The half-steps of packed codes, in order."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1)
    codes = codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    index = codes & 7
    # Arithmetic rather than a table look-up: XLA vectorises it.
    small = jnp.where(index <= 4, index, 2 * index - 4)
    size = jnp.where(index == 7, 12, small).astype(jnp.int8)
    return jnp.where(codes >= 8, -size, size)


def power_of_two(exponent: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """2**exponent, exactly, for exponents from -126 to 127."""
    return lax.bitcast_convert_type((exponent + BIAS) << 23, jnp.float32)


def scale_of(exponent: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """The scale 2**(exponent - 127) of an E8M0 byte; 0 gives zero, 255 (NaN in E8M0) infinity."""
    return power_of_two(exponent.astype(jnp.int32) - BIAS)


def ceil_log2(x: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """Smallest e with x <= 2**e, for positive normal float32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return (bits >> 23) - BIAS + ((bits & 0x7FFFFF) != 0)


def ceil_log2_of_sixth(x: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """Smallest e with x <= 6 * 2**e, for positive normal float32: the scale that just holds x."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return (bits >> 23) - BIAS - 2 + ((bits & 0x7FFFFF) > 0x400000)
