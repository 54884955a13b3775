"""Convolution in one dimension by short algorithms, quantized or not: Toom-Cook, Winograd, RSQ."""

from cmjax.primitives.convolution.calibration import calibrate, least_error_step, saturation
from cmjax.primitives.convolution.choice import choose_algorithm, expected_sqnr_db
from cmjax.primitives.convolution.floating import TransformedConv
from cmjax.primitives.convolution.fsmn import fsmn_memory
from cmjax.primitives.convolution.lengths import zero_padding_frames
from cmjax.primitives.convolution.packed import PackedConv, prepack
from cmjax.primitives.convolution.plan import ConvPlan, FilterPlan
from cmjax.primitives.convolution.rsq import lsq_gradient_scale, rsq_quantize
from cmjax.primitives.convolution.scales import ConvScales
from cmjax.primitives.convolution.toom_cook import ALGORITHMS, Algorithm, supported
from cmjax.primitives.convolution.winograd import int8_conv1d, winograd_conv1d

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "ConvPlan",
    "ConvScales",
    "FilterPlan",
    "PackedConv",
    "TransformedConv",
    "calibrate",
    "choose_algorithm",
    "expected_sqnr_db",
    "fsmn_memory",
    "int8_conv1d",
    "least_error_step",
    "lsq_gradient_scale",
    "prepack",
    "rsq_quantize",
    "saturation",
    "supported",
    "winograd_conv1d",
    "zero_padding_frames",
]
