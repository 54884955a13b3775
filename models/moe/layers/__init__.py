"""The layers of a mixture-of-experts transformer, as one rank holds them."""

from cmjax.models.moe.layers.cache import (
    GroupedCache,
    LatentCache,
    LayerCache,
    ModelCache,
    empty_cache,
    extend_cache,
)
from cmjax.models.moe.layers.experts import Experts, SwiGLU
from cmjax.models.moe.layers.gqa import GQA
from cmjax.models.moe.layers.linear import Linear, Weight, matmul, quantize_params
from cmjax.models.moe.layers.mla import MLA
from cmjax.models.moe.layers.moe import MoE, moe_stages, run_moe
from cmjax.models.moe.layers.mtp import MTPHead
from cmjax.models.moe.layers.norm import RMSNorm, rms_norm
from cmjax.models.moe.layers.router import Router, gate
from cmjax.models.moe.layers.transformer import DenseLayer, MoELayer, Stack, Transformer

__all__ = [
    "GQA",
    "MLA",
    "DenseLayer",
    "Experts",
    "GroupedCache",
    "LatentCache",
    "LayerCache",
    "Linear",
    "MTPHead",
    "MoE",
    "MoELayer",
    "ModelCache",
    "RMSNorm",
    "Router",
    "Stack",
    "SwiGLU",
    "Transformer",
    "Weight",
    "empty_cache",
    "extend_cache",
    "gate",
    "matmul",
    "moe_stages",
    "quantize_params",
    "rms_norm",
    "run_moe",
]
