"""Matrix products and convolutions, on the cube cores."""

import math

from cmjax.program.rules.registry import cost_rule
from cmjax.program.size import Size, product
from cmjax.program.work import Operand, Work, matmul_flops


@cost_rule("dot_general", "scaled_dot")
def _dot_general(lhs: Operand, rhs: Operand, *scales: Operand, dimension_numbers, **_) -> Work:
    """2 M N K FLOP on the cube cores, at the rate of the wider operand; 8 M N K if complex. Scales
    of blocks are applied there."""
    (contract, _), (batch, _) = dimension_numbers
    (_, contract_rhs), (_, batch_rhs) = dimension_numbers
    inner = product(lhs.shape[d] for d in contract)
    outer = product(lhs.shape[d] for d in batch)
    rows = product(d for i, d in enumerate(lhs.shape) if i not in (*contract, *batch))
    columns = product(d for i, d in enumerate(rhs.shape) if i not in (*contract_rhs, *batch_rhs))
    return _multiply_add(lhs, rhs, outer * rows * columns * inner, inner)


@cost_rule("scaled_matmul", "scaled_matmul_wrapper")
def _scaled_matmul(lhs: Operand, rhs: Operand, *scales: Operand, **_) -> Work:
    """`jax.nn.scaled_matmul` of [batch, M, K] and [batch, N, K], as `scaled_dot`."""
    batch, rows, inner = lhs.shape
    return _multiply_add(lhs, rhs, product((batch, rows, inner, rhs.shape[1])), inner)


@cost_rule("ragged_dot_general")
def _ragged_dot_general(
    lhs: Operand, rhs: Operand, sizes: Operand, *, ragged_dot_dimension_numbers, **_
) -> Work:
    """A product in groups of rows (experts): every row meets the matrix of its own group only.

    2 M N K FLOP whatever the groups are; HBM reads the matrices of all groups once.
    """
    numbers = ragged_dot_dimension_numbers
    (contract, contract_rhs), (batch, batch_rhs) = numbers.dot_dimension_numbers
    inner = product(lhs.shape[d] for d in contract)
    outer = product(lhs.shape[d] for d in batch)
    rows = product(d for i, d in enumerate(lhs.shape) if i not in (*contract, *batch))
    other = (*contract_rhs, *batch_rhs, *numbers.rhs_group_dimensions)
    columns = product(d for i, d in enumerate(rhs.shape) if i not in other)
    return _multiply_add(lhs, rhs, outer * rows * columns * inner, inner, kind="grouped")


@cost_rule("conv_general_dilated")
def _convolution(
    lhs: Operand,
    rhs: Operand,
    *,
    out,
    dimension_numbers,
    window_strides,
    lhs_dilation,
    rhs_dilation,
    padding,
    **_,
) -> Work:
    """2 x outputs x (kernel taps x input channels per group) FLOP.

    Zeros that a dilated input has between its elements (a transposed convolution, the input
    gradient of a strided one) are never multiplied: only taps that meet an element count. Zeros
    of the padding are counted, as kernels compute with them.
    """
    spatial_rhs = dimension_numbers.rhs_spec[2:]
    spatial_out = dimension_numbers.out_spec[2:]
    inner = rhs.size / rhs.shape[dimension_numbers.rhs_spec[0]]
    pairs = out[0].size * inner
    geometry = zip(window_strides, lhs_dilation, rhs_dilation, padding, strict=True)
    for i, (stride, spread, dilation, (before, _)) in enumerate(geometry):
        if spread > 1:
            length, taps = out[0].shape[spatial_out[i]], rhs.shape[spatial_rhs[i]]
            pairs = pairs * _share_met(length, taps, stride, spread, dilation, before)
    return _multiply_add(lhs, rhs, pairs, inner)


def _share_met(length: Size, taps: Size, stride: int, spread: int, dilation: int, before) -> float:
    """Of all (output, tap) pairs along one axis, those that fall on an element of an input spread
    by `spread`: output o and tap k look at o * stride + k * dilation - before."""
    # The pattern repeats after `spread` outputs and taps, which stands for a symbolic length.
    outputs = int(length.constant) if length.constant is not None else spread
    kernel = int(taps.constant) if taps.constant is not None else spread
    first = Size.of(before).constant or 0.0
    by_output, by_tap = [0] * spread, [0] * spread
    for o in range(outputs):
        by_output[int(o * stride - first) % spread] += 1
    for k in range(kernel):
        by_tap[(k * dilation) % spread] += 1
    met = sum(by_output[r] * by_tap[-r % spread] for r in range(spread))
    return met / (outputs * kernel)


def _multiply_add(
    lhs: Operand, rhs: Operand, pairs: Size, inner: Size, kind: str = "compute"
) -> Work:
    """Work of `pairs` multiply-adds: two FLOP each, times the real products of a complex one."""
    flops = pairs * (2.0 * math.prod(2.0 if x.is_complex else 1.0 for x in (lhs, rhs)))
    wider = lhs.dtype if lhs.itemsize >= rhs.itemsize else rhs.dtype
    return Work(kind=kind, flops=flops, **matmul_flops(wider, flops, inner))
