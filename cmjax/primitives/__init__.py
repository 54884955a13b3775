"""Operations the NPU does its own way, as JAX primitives with all their rules."""

from cmjax.primitives.attention import attention, latent_attention
from cmjax.primitives.conv_choice import choose_algorithm, expected_sqnr_db
from cmjax.primitives.conv_scales import ConvScales, calibrate, least_error_step
from cmjax.primitives.exchange import Dispatched, combine, dispatch, quantize_rows
from cmjax.primitives.packed_conv import PackedConv, prepack
from cmjax.primitives.rsq import lsq_gradient_scale, rsq_quantize
from cmjax.primitives.toom_cook import ALGORITHMS, Algorithm
from cmjax.primitives.winograd import int8_conv1d, winograd_conv1d

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "ConvScales",
    "Dispatched",
    "PackedConv",
    "attention",
    "calibrate",
    "choose_algorithm",
    "combine",
    "dispatch",
    "expected_sqnr_db",
    "int8_conv1d",
    "latent_attention",
    "least_error_step",
    "lsq_gradient_scale",
    "prepack",
    "quantize_rows",
    "rsq_quantize",
    "winograd_conv1d",
]
