"""Ranges of integers in which a quantized convolution is exact.

    |v| <= LARGEST_OPERAND,   depth |u| |v| < 2**31   (sums),   R max|B^T|_1 < 2**24   (transforms)

Operands v fit their dtype, a transformed filter u is so small that no int32 sum overflows, and the
input range R so small that float32 holds every transformed integer.
"""

import jax.numpy as jnp

from cmjax.primitives.convolution.toom_cook import ALGORITHMS

LARGEST_OPERAND = {"int8": 127, "int16": 2047}
"""Largest |operand| of each integer domain; 12 bits of int16 leave room for a sum of products."""

_EXACT_BELOW = 2**24  # integers in float32
_INT32_MAX = 2**31 - 1
_SMALLEST_FILTER_RANGE = 127  # fewer levels than int8 has would be worse than int8


def filter_limit(
    domain: str, depth: int, *, function: str = "winograd_conv1d", operand: int | None = None
) -> int:
    """Largest |integer| that a transformed filter may hold, so that no int32 sum overflows.

    Args:
      domain: "int8" or "int16".
      depth: products added up, tap blocks times input channels.
      function: name for errors.
      operand: largest |v| of the signal, if not that of the domain.
    Raises: ValueError for a depth at which the filter would be left with less than 8 bits; the
      message gives the largest that is safe.
    """
    largest = LARGEST_OPERAND[domain]
    operand = largest if operand is None else operand
    most = _INT32_MAX // (operand * depth)
    if most < _SMALLEST_FILTER_RANGE:
        safe = _INT32_MAX // (operand * _SMALLEST_FILTER_RANGE)
        raise ValueError(
            f"{function}: {depth} products of {domain} operands could overflow the int32 "
            f"sum; the largest safe number of input channels times tap blocks is {safe}"
        )
    return min(largest, most)


def largest_input_limit(algorithm: str) -> int:
    """Largest R at which the algorithm's input transform is exact in float32, 32767 at most."""
    return min(2**15 - 1, (_EXACT_BELOW - 1) // ALGORITHMS[algorithm].growth)


def input_range(input_limit: int, zero_point: int) -> tuple[int, int]:
    """Smallest and largest integer of the input, (low, high).

    Symmetric without a zero point; with one, all of a two's complement integer less the zero point.
    Raises: ValueError for a zero point that such an integer does not hold.
    """
    if zero_point == 0:
        return -input_limit, input_limit
    if not -input_limit - 1 <= zero_point <= input_limit:
        raise ValueError(
            f"winograd_conv1d: zero_point must lie in {-input_limit - 1}..{input_limit}, the "
            f"integers of the input, got {zero_point}"
        )
    return -input_limit - 1 - zero_point, input_limit - zero_point


def largest_operand(algorithm: str, input_limit: int, operand_limit: int, zero_point: int) -> int:
    """Largest |v|: V, but where integers with a zero point are operands as they are, the largest
    of those, which may take 16 bits."""
    if zero_point and algorithm == "direct" and input_limit <= operand_limit:
        return max(map(abs, input_range(input_limit, zero_point)))
    return operand_limit


def domain_of(operand_limit: int) -> str:
    """The narrowest integer domain whose operands reach so far."""
    return "int8" if operand_limit <= LARGEST_OPERAND["int8"] else "int16"


def operand_dtype(operand_limit: int) -> jnp.dtype:
    """The dtype of operands up to this limit."""
    return jnp.dtype(domain_of(operand_limit))
