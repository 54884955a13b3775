"""A filter made ready for the integer convolution: transformed, quantised and laid out.

u = clip(round((G w) / filter_step)),    scale = input_step * point_step * filter_step
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from cmjax import native
from cmjax.primitives import conv_kernel
from cmjax.primitives.conv_checks import check_algorithm, check_geometry
from cmjax.primitives.conv_geometry import fold_filter, folding
from cmjax.primitives.conv_scales import ConvScales, check_scales, transformed_filter
from cmjax.primitives.quantized_conv import filter_limit
from cmjax.primitives.rsq import round_to, rounded
from cmjax.primitives.toom_cook import ALGORITHMS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedConv:
    """What `prepack` makes of a filter and its scales; a pytree, for `winograd_conv1d` alone.

    Fields:
      u: integers of the transformed filter, laid out for kernels if `packed`.
      inverse_step, requant, scale: as in `quantized_conv`.
      algorithm, domain, input_limit: of the scales.
      taps, cin, stride, dilation: of the filter as it was given.
      packed: u is `conv_kernel.pack_filter`'s.
    """

    u: Array
    inverse_step: Float32[Array, "cin"]
    requant: Float32[Array, "points"]
    scale: Float32[Array, "points cout"]
    algorithm: str = dataclasses.field(metadata={"static": True})
    domain: str = dataclasses.field(metadata={"static": True})
    input_limit: int = dataclasses.field(metadata={"static": True})
    taps: int = dataclasses.field(metadata={"static": True})
    cin: int = dataclasses.field(metadata={"static": True})
    stride: int = dataclasses.field(metadata={"static": True})
    dilation: int = dataclasses.field(metadata={"static": True})
    packed: bool = dataclasses.field(metadata={"static": True})


def prepack(
    w: Float[Array, "taps cin cout"],
    scales: ConvScales,
    *,
    stride: int = 1,
    dilation: int = 1,
    packed: bool | None = None,
) -> PackedConv:
    """Quantise a filter once, for any number of calls of `winograd_conv1d`.

    Args:
      w: the filter.
      scales: from `calibrate`, or learned from there.
      stride, dilation: of the convolution; a stride is folded into input channels.
      packed: lay the filter out for the C++ kernels; by default, if they are enabled. Every
        platform computes the same from either layout; without kernels the plain one is faster.
    Returns: operands that give bit for bit what `winograd_conv1d(x, w, scales=scales)` gives.
    Raises: ValueError for scales that do not fit the filter or are not positive, or for more input
      channels than an int32 sum can take; TypeError if `w` is not floating point.
    """
    operands = quantize_filter("prepack", w, scales, stride=stride, dilation=dilation)
    dtype = jnp.int8 if scales.domain == "int8" else jnp.int16
    u = operands.u.astype(dtype)
    if packed is None:
        packed = native.status().enabled and conv_kernel.serves(scales.algorithm)
    if packed:
        taps = folding(w.shape[0], stride, dilation).taps
        u = conv_kernel.pack_filter(u, tap_blocks=ALGORITHMS[scales.algorithm].tap_blocks(taps))
    return dataclasses.replace(operands, u=u, packed=packed)


def quantize_filter(
    function: str,
    w: Float[Array, "taps cin cout"],
    scales: ConvScales,
    *,
    stride: int,
    dilation: int,
) -> PackedConv:
    """The operands with u still as integers in float32, differentiable in `w` and `scales`."""
    w = jnp.asarray(w)
    if w.ndim != 3:
        raise ValueError(f"{function}: w must be [taps, cin, cout], got {w.shape}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{function}: w must be floating point, got {w.dtype}")
    check_geometry(function, stride, dilation)
    taps, cin, cout = w.shape
    fold = folding(taps, stride, dilation)
    check_algorithm(function, scales.algorithm, fold.taps, fold.dilation)
    check_scales(function, scales, cin, cout)
    limit = _limit(scales, fold.taps, cin * fold.frames)
    input_step, unit = scales.input_step, scales.input_step
    w = w.astype(jnp.float32)
    if input_step.ndim:
        unit = jnp.max(input_step)
        w = w * rounded(input_step / unit)[:, None]
    u = transformed_filter(fold_filter(w, fold), scales.algorithm)
    z = rounded(u * rounded(1 / scales.filter_step)[:, None, :])
    inverse_step = jnp.tile(jnp.broadcast_to(rounded(1 / input_step), (cin,)), fold.frames)
    return PackedConv(
        u=round_to(z, limit),
        inverse_step=inverse_step,
        requant=rounded(1 / scales.point_step),
        scale=rounded(unit * scales.point_step)[:, None] * scales.filter_step,
        algorithm=scales.algorithm,
        domain=scales.domain,
        input_limit=scales.input_limit,
        taps=taps,
        cin=cin,
        stride=stride,
        dilation=dilation,
        packed=False,
    )


def _limit(scales: ConvScales, taps: int, cin: int) -> int:
    return filter_limit(scales.domain, ALGORITHMS[scales.algorithm].tap_blocks(taps) * cin)
