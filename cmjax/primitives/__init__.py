"""Operations the NPU does its own way, as JAX primitives with all their rules."""

from cmjax.primitives.attention import attention, latent_attention
from cmjax.primitives.attention_numerics import AttentionNumerics, attention_numerics
from cmjax.primitives.exchange import Dispatched, combine, dispatch, quantize_rows
from cmjax.primitives.pasa import flash_attention, merge_by_lse, pasa_attention
from cmjax.primitives.pasa_shift import pasa_beta

__all__ = [
    "AttentionNumerics",
    "Dispatched",
    "attention",
    "attention_numerics",
    "combine",
    "dispatch",
    "flash_attention",
    "latent_attention",
    "merge_by_lse",
    "pasa_attention",
    "pasa_beta",
    "quantize_rows",
]
