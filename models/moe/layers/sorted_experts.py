"""The experts of a decode step as one call: of few rows, on a CPU that holds every expert.

Sorting some rows, two products and what lies between them are a dozen kernels of XLA's, each as
dear as it computes little. The numbers are those of the stages, which the NPU runs and which are
priced.
"""

from typing import TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from cmjax import native
from cmjax.models.moe.layers.few import is_few
from cmjax.models.moe.layers.sorted import sort_by_slot, unsort
from cmjax.models.moe.layers.swiglu import swiglu
from cmjax.primitives.define import define_call
from cmjax.primitives.grouped import grouped_msd_dot
from cmjax.primitives.msd import QuantizedWeight


def sorted_experts(
    x: Float[Array, "tokens hidden"],
    slots: Int32[Array, "tokens copies"],
    weights: Float32[Array, "tokens copies"],
    up: QuantizedWeight,
    down: QuantizedWeight,
) -> Float[Array, "tokens hidden"]:
    """Every token's weighted sum over the SwiGLU experts in its slots.

    Args:
      x: normalised tokens.
      slots: of each copy of a token. weights: of each copy.
      up: `[slots, 2 ffn, hidden]`, gate first. down: `[slots, hidden, ffn]`; both int8 with a scale
        per feature, or MXFP4.
    Returns: the dtype of `x`.
    """
    operands = x, slots, weights, up.values, up.scale, down.values, down.scale
    return sorted_experts_p.bind(*operands, format=up.format)[0]


def is_one_call(matrices: tuple, x: Array) -> TypeGuard[tuple[QuantizedWeight, QuantizedWeight]]:
    """Whether a CPU has one call for these tokens: few, and matrices in formats that it reads."""
    return is_few(x) and all(isinstance(matrix, QuantizedWeight) for matrix in matrices)


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


sorted_experts_p = define_call("cm_sorted_experts", _reference, _native)
