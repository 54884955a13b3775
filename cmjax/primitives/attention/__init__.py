"""Attention: exact, over a latent cache, blockwise, and in half precision (PASA)."""

from cmjax.primitives.attention.cached import cached_attention
from cmjax.primitives.attention.exact import attention, latent_attention, visible_keys
from cmjax.primitives.attention.merge import merge_by_lse, with_sinks
from cmjax.primitives.attention.numerics import AttentionNumerics, attention_numerics
from cmjax.primitives.attention.pasa import flash_attention, pasa_attention
from cmjax.primitives.attention.pasa_shift import pasa_beta

__all__ = [
    "AttentionNumerics",
    "attention",
    "attention_numerics",
    "cached_attention",
    "flash_attention",
    "latent_attention",
    "merge_by_lse",
    "pasa_attention",
    "pasa_beta",
    "visible_keys",
    "with_sinks",
]
