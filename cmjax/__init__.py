"""cmjax: a differentiable performance-and-accuracy model of the CloudMatrix384 supernode."""

from cmjax.primitives import (
    attention_numerics,
    combine,
    dispatch,
    int8_conv1d,
    msd_attention,
    msd_decompose,
    msd_dot,
    pasa_attention,
    quantize_kv,
    quantize_weight,
    rsq_quantize,
    winograd_conv1d,
)

__all__ = [
    "attention_numerics",
    "combine",
    "dispatch",
    "int8_conv1d",
    "msd_attention",
    "msd_decompose",
    "msd_dot",
    "pasa_attention",
    "quantize_kv",
    "quantize_weight",
    "rsq_quantize",
    "winograd_conv1d",
]
