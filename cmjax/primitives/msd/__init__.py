"""Multi-scale dequantization: products and attention that read INT8 and MXFP4 as they are."""

from cmjax.primitives.msd.attention import msd_attention
from cmjax.primitives.msd.decompose import Decomposed, msd_decompose
from cmjax.primitives.msd.kv import QuantizedKV, quantize_kv
from cmjax.primitives.msd.product import msd_dot
from cmjax.primitives.msd.weight import (
    QuantizedWeight,
    WeightFormat,
    dequantize_weight,
    quantize_weight,
)

__all__ = [
    "Decomposed",
    "QuantizedKV",
    "QuantizedWeight",
    "WeightFormat",
    "dequantize_weight",
    "msd_attention",
    "msd_decompose",
    "msd_dot",
    "quantize_kv",
    "quantize_weight",
]
