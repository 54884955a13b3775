"""SwiGLU feed-forward blocks: the experts in a rank's slots, and the dense (or shared) one.

y = (silu(x W_gate) * (x W_up)) W_down
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from cmjax.models.moe.arithmetic import ExpertFormat, Format
from cmjax.models.moe.layers.linear import Linear, Weight, observe
from cmjax.models.moe.layers.sorted import SortedRows
from cmjax.models.moe.layers.swiglu import activate, swiglu
from cmjax.models.moe.parallelism import Parallelism
from cmjax.primitives.exchange import quantize_rows
from cmjax.primitives.grouped import grouped_dot, grouped_msd_dot, stacked_dot
from cmjax.primitives.int4 import Int4Weight, grouped_int4_dot, int4_dot
from cmjax.primitives.msd import QuantizedWeight
from cmjax.primitives.msd.product import msd_dot
from cmjax.program.mark import fused


class Experts(nnx.Module):
    """One expert per slot, applied to the rows dispatched to that slot.

    Parameters have a leading axis of slots: `gate_up [slots, hidden, 2 * ffn]` (gate first) and
    `down [slots, ffn, hidden]`; few-bit ones are stored as in `Linear`.
    """

    def __init__(self, slots: int, hidden: int, ffn: int, *, format: ExpertFormat, rngs: nnx.Rngs):
        linear = functools.partial(Linear, format=format, rngs=rngs, stack=(slots,))
        self.gate_up = linear(hidden, 2 * ffn)
        self.down = linear(ffn, hidden)

    def __call__(
        self, rows: Array, scale: Float32[Array, "slots rows"], dtype: jnp.dtype
    ) -> Float[Array, "slots rows hidden"]:
        """Outputs in `dtype`. `rows [slots, rows, hidden]` are int8 steps of `scale`, or floating
        point (then `scale` is ones and not read)."""
        up, down = self.gate_up.matrix, self.down.matrix
        if isinstance(up.value, Int4Weight) and isinstance(down.value, Int4Weight):
            steps, step = _swiglu_int8(_sums_int4(rows, up.value), scale, 1.0)
            return _grouped_int4_matmul(dtype)(steps, step, down.value)
        if up.scale is None or down.scale is None:
            return _batched(swiglu(_batched(rows, up)), down).astype(dtype)
        assert isinstance(up.value, jax.Array) and isinstance(down.value, jax.Array), "W8A8"
        steps, step = _swiglu_int8(_sums_int8(rows, up.value), scale, up.scale[:, None, :])
        return _grouped_matmul(dtype)(steps, step, down.value, down.scale)

    def of_sorted(self, sent: SortedRows, dtype: jnp.dtype) -> Float[Array, "rows hidden"]:
        """Outputs in `dtype` for rows that are sorted by slot."""
        up, down = self.gate_up.matrix, self.down.matrix
        if isinstance(up.value, Int4Weight) and isinstance(down.value, Int4Weight):
            assert sent.scale is not None, "W4A8 rows are steps"
            total = grouped_int4_dot(sent.rows, up.value, sent.sizes)
            steps, step = _swiglu_int8(total, sent.scale, 1.0)
            total = grouped_int4_dot(steps, down.value, sent.sizes)
            return _rescale(total, step, 1.0).astype(dtype)
        if sent.scale is None or up.scale is None or down.scale is None:
            hidden = swiglu(_grouped(sent.rows, up, sent.sizes))
            return _grouped(hidden, down, sent.sizes).astype(dtype)
        assert isinstance(up.value, jax.Array) and isinstance(down.value, jax.Array), "W8A8"
        total = grouped_dot(sent.rows, up.value, sent.sizes)
        steps, step = _swiglu_int8(total, sent.scale, up.scale[sent.slots])
        total = grouped_dot(steps, down.value, sent.sizes)
        return _rescale(total, step, down.scale[sent.slots]).astype(dtype)


class SwiGLU(nnx.Module):
    """The dense feed-forward block, also the shared expert; `ffn` is its inner width, of which a
    rank of a tensor-parallel group holds its part."""

    def __init__(
        self,
        hidden: int,
        ffn: int,
        parallelism: Parallelism,
        *,
        format: Format,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        self.parallelism, ffn = parallelism, ffn // parallelism.tensor
        self.gate_up = Linear(hidden, 2 * ffn, format=format, rngs=rngs, bias=bias)
        self.down = Linear(ffn, hidden, format=format, rngs=rngs, bias=bias)

    def __call__(self, x: Float[Array, "own *batch hidden"]) -> Float[Array, "own *batch hidden"]:
        x = self.parallelism.gather(x)
        return self.parallelism.scatter(self.down(swiglu(self.gate_up(x))))


def _batched(x, weight: Weight):
    """Each slot's rows by its matrix, in the dtype of the rows."""
    observe(weight.name, x)
    if isinstance(weight.value, QuantizedWeight):
        return msd_dot(x, weight.value)
    assert isinstance(weight.value, jax.Array), "floats"
    return stacked_dot(x, weight.value.astype(x.dtype))


def _grouped(x, weight: Weight, sizes):
    """Rows sorted by slot, by the matrices of their slots."""
    if isinstance(weight.value, QuantizedWeight):
        return grouped_msd_dot(x, weight.value, sizes)
    assert isinstance(weight.value, jax.Array), "floats"
    return grouped_dot(x, weight.value.astype(x.dtype), sizes)


# The up-projection of all slots, whose sums the next kernel rescales.
_sums_int8 = fused("GroupedMatmul")(stacked_dot)
_sums_int4 = fused("GroupedMatmul")(int4_dot)


@functools.cache
def _grouped_matmul(dtype: jnp.dtype):
    """The down-projection of all slots: integers in, values in `dtype` out."""

    @fused("GroupedMatmul")
    def kernel(steps, step, weight, weight_scale):
        total = stacked_dot(steps, weight)
        return _rescale(total, step, weight_scale[:, None, :]).astype(dtype)

    return kernel


@functools.cache
def _grouped_int4_matmul(dtype: jnp.dtype):
    """The same with matrices of four bits."""

    @fused("GroupedMatmul")
    def kernel(steps, step, weight):
        return _rescale(int4_dot(steps, weight), step, 1.0).astype(dtype)

    return kernel


def _rescale(total, row_scale, column_scale):
    """Integer sums [..., rows, n] to values; scales of columns broadcast to them."""
    return total.astype(jnp.float32) * row_scale[..., None] * column_scale


@fused("SwiGLU")
def _swiglu_int8(total, row_scale, column_scale):
    """Rescale, activate, and quantize again for the second matmul: the values stay on chip."""
    return quantize_rows(activate(_rescale(total, row_scale, column_scale)))
