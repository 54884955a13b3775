"""The experts of a decode step as one call: of few rows, on a CPU that holds every expert.

Sorting some rows, two products and what lies between them are a dozen kernels of XLA's, each as
dear as it computes little. The numbers are those of the stages, which the NPU runs and which are
priced.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from cmjax import native
from cmjax.models.moe.layers.few import is_few
from cmjax.models.moe.layers.linear import Weight
from cmjax.models.moe.layers.sorted import sort_by_slot, unsort
from cmjax.models.moe.layers.swiglu import activate, swiglu
from cmjax.primitives.define import define_call
from cmjax.primitives.exchange import quantize_rows
from cmjax.primitives.grouped import grouped_dot, grouped_msd_dot
from cmjax.primitives.msd import QuantizedWeight


def sorted_experts(
    x: Float[Array, "tokens hidden"],
    slots: Int32[Array, "tokens copies"],
    weights: Float32[Array, "tokens copies"],
    up: Weight,
    down: Weight,
) -> Float[Array, "tokens hidden"]:
    """Every token's weighted sum over the SwiGLU experts in its slots.

    Args:
      x: normalised tokens.
      slots: of each copy of a token. weights: of each copy.
      up: `[slots, 2 ffn, hidden]`, gate first. down: `[slots, hidden, ffn]`; both int8 with a scale
        per feature, or MXFP4. Of W8A8 `[slots, hidden, 2 ffn]` and `[slots, ffn, hidden]`.
    Returns: the dtype of `x`.
    """
    if isinstance(up.value, QuantizedWeight) and isinstance(down.value, QuantizedWeight):
        matrices = up.value.values, up.value.scale, down.value.values, down.value.scale
        return sorted_experts_p.bind(x, slots, weights, *matrices, format=up.value.format)[0]
    return sorted_w8a8_p.bind(x, slots, weights, up.value, up.scale, down.value, down.scale)[0]


def is_one_call(up: Weight, down: Weight, x: Array) -> bool:
    """Whether a CPU has one call for these tokens: few, and matrices in formats that it reads."""
    if not is_few(x):
        return False
    if up.scale is not None and down.scale is not None:  # W8A8
        return native.status().isa in ("avx2", "avx512_vnni")
    return isinstance(up.value, QuantizedWeight) and isinstance(down.value, QuantizedWeight)


def _weight(values, scale, format):
    group = 32 if format == "mxfp4" else None
    return QuantizedWeight(values=values, scale=scale, format=format, group_size=group)


def _reference(x, slots, weights, up, up_scale, down, down_scale, *, format):
    sent = sort_by_slot(x, slots, up.shape[0], quantize=False)
    hidden = swiglu(grouped_msd_dot(sent.rows, _weight(up, up_scale, format), sent.sizes))
    rows = grouped_msd_dot(hidden, _weight(down, down_scale, format), sent.sizes)
    return [unsort(rows, sent, weights)]


def _native(x, slots, weights, up, up_scale, down, down_scale, *, format):
    operands = slots, weights, up, up_scale, down, down_scale
    if x.dtype not in (jnp.float32, jnp.bfloat16) or min(*slots.shape, *up.shape) == 0:
        return _reference(x, *operands, format=format)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return [native.call(f"cmjax_sorted_experts_{format}", out, x, *operands)]


def _reference_w8a8(x, slots, weights, up, up_scale, down, down_scale):
    sent = sort_by_slot(x, slots, up.shape[0], quantize=True)
    total = grouped_dot(sent.rows, up, sent.sizes)
    steps, step = quantize_rows(activate(_rescaled(total, sent.scale, up_scale[sent.slots])))
    total = grouped_dot(steps, down, sent.sizes)
    return [unsort(_rescaled(total, step, down_scale[sent.slots]).astype(x.dtype), sent, weights)]


def _rescaled(total, row_scale, column_scale):
    return total.astype(jnp.float32) * row_scale[:, None] * column_scale


def _native_w8a8(x, slots, weights, *matrices):
    if x.dtype not in (jnp.float32, jnp.bfloat16) or min(*slots.shape, *matrices[0].shape) == 0:
        return _reference_w8a8(x, slots, weights, *matrices)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return [native.call("cmjax_sorted_experts_w8a8", out, x, slots, weights, *matrices)]


sorted_experts_p = define_call("cm_sorted_experts", _reference, _native)
sorted_w8a8_p = define_call("cm_sorted_experts_w8a8", _reference_w8a8, _native_w8a8)
