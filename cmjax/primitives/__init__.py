"""Operations the NPU does its own way, as JAX primitives with all their rules."""

from cmjax.primitives.attention.exact import attention, latent_attention
from cmjax.primitives.attention.numerics import AttentionNumerics, attention_numerics
from cmjax.primitives.attention.pasa import flash_attention, merge_by_lse, pasa_attention
from cmjax.primitives.attention.pasa_shift import pasa_beta
from cmjax.primitives.convolution.choice import choose_algorithm, expected_sqnr_db
from cmjax.primitives.convolution.packed import PackedConv, TransformedConv, prepack
from cmjax.primitives.convolution.rsq import lsq_gradient_scale, rsq_quantize
from cmjax.primitives.convolution.scales import ConvScales, calibrate, least_error_step
from cmjax.primitives.convolution.toom_cook import ALGORITHMS, Algorithm
from cmjax.primitives.convolution.winograd import int8_conv1d, winograd_conv1d
from cmjax.primitives.exchange import Dispatched, combine, dispatch, quantize_rows
from cmjax.primitives.msd.attention import msd_attention
from cmjax.primitives.msd.decompose import Decomposed, msd_decompose
from cmjax.primitives.msd.product import msd_dot
from cmjax.primitives.msd.quantize_kv import QuantizedKV, quantize_kv
from cmjax.primitives.msd.quantize_weight import QuantizedWeight, dequantize_weight, quantize_weight

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AttentionNumerics",
    "ConvScales",
    "Decomposed",
    "Dispatched",
    "PackedConv",
    "QuantizedKV",
    "QuantizedWeight",
    "TransformedConv",
    "attention",
    "attention_numerics",
    "calibrate",
    "choose_algorithm",
    "combine",
    "dequantize_weight",
    "dispatch",
    "expected_sqnr_db",
    "flash_attention",
    "int8_conv1d",
    "latent_attention",
    "least_error_step",
    "lsq_gradient_scale",
    "merge_by_lse",
    "msd_attention",
    "msd_decompose",
    "msd_dot",
    "pasa_attention",
    "pasa_beta",
    "prepack",
    "quantize_kv",
    "quantize_rows",
    "quantize_weight",
    "rsq_quantize",
    "winograd_conv1d",
]
