"""Operations the NPU does its own way, as JAX primitives with all their rules."""

from cmjax.primitives.attention import attention, latent_attention
from cmjax.primitives.exchange import Dispatched, combine, dispatch, quantize_rows
from cmjax.primitives.msd import msd_dot
from cmjax.primitives.msd_attention import msd_attention
from cmjax.primitives.msd_decompose import Decomposed, msd_decompose
from cmjax.primitives.quantize_kv import QuantizedKV, quantize_kv
from cmjax.primitives.quantize_weight import QuantizedWeight, dequantize_weight, quantize_weight

__all__ = [
    "Decomposed",
    "Dispatched",
    "QuantizedKV",
    "QuantizedWeight",
    "attention",
    "combine",
    "dequantize_weight",
    "dispatch",
    "latent_attention",
    "msd_attention",
    "msd_decompose",
    "msd_dot",
    "quantize_kv",
    "quantize_rows",
    "quantize_weight",
]
