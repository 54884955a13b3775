"""Operations the NPU does its own way, as JAX primitives with all their rules."""

from cmjax.primitives.attention import attention, latent_attention
from cmjax.primitives.exchange import Dispatched, combine, dispatch, quantize_rows

__all__ = ["Dispatched", "attention", "combine", "dispatch", "latent_attention", "quantize_rows"]
