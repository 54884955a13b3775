"""A filter made ready for the integer convolution: transformed, quantized and laid out.

u = clip(round((G w) / filter_step)),    scale = input_step * point_step * filter_step
"""

import dataclasses
import functools
from typing import overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from cmjax import native
from cmjax.primitives.convolution import kernel as conv_kernel
from cmjax.primitives.convolution.checks import check_algorithm, check_filter, check_geometry
from cmjax.primitives.convolution.choice import choose_algorithm
from cmjax.primitives.convolution.geometry import Folding, fold_filter, folding
from cmjax.primitives.convolution.quantized import LARGEST_OPERAND, quantized_filter
from cmjax.primitives.convolution.rsq import rounded
from cmjax.primitives.convolution.scales import (
    ConvScales,
    check_scales,
    check_scales_fit,
    transformed_filter,
)
from cmjax.primitives.convolution.tiles import transform_filter
from cmjax.primitives.convolution.toom_cook import ALGORITHMS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedConv:
    """What `prepack` makes of a filter and its scales; a pytree, for `winograd_conv1d` alone.

    Fields:
      u: the transformed filter as `quantized_conv` takes it.
      input_step, point_step, filter_step: of the scales, the first for folded channels.
      algorithm, domain, input_limit: of the scales.
      taps, cin, stride, dilation: of the filter as it was given.
      packed: u is `conv_kernel.pack_filter`'s.
    """

    u: Array
    input_step: Float32[Array, "*folded_cin"]
    point_step: Float32[Array, "points"]
    filter_step: Float32[Array, "points cout"]
    algorithm: str = dataclasses.field(metadata={"static": True})
    domain: str = dataclasses.field(metadata={"static": True})
    input_limit: int = dataclasses.field(metadata={"static": True})
    taps: int = dataclasses.field(metadata={"static": True})
    cin: int = dataclasses.field(metadata={"static": True})
    stride: int = dataclasses.field(metadata={"static": True})
    dilation: int = dataclasses.field(metadata={"static": True})
    packed: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformedConv:
    """What `prepack` makes of a filter without scales; a pytree, for `winograd_conv1d` alone.

    Fields:
      filters: G w, one array per point; for "direct" the filter itself.
      algorithm: name in `toom_cook.ALGORITHMS`.
      taps, cin, stride, dilation: of the filter as it was given.
    """

    filters: tuple[Float32[Array, "depth cout"], ...]
    algorithm: str = dataclasses.field(metadata={"static": True})
    taps: int = dataclasses.field(metadata={"static": True})
    cin: int = dataclasses.field(metadata={"static": True})
    stride: int = dataclasses.field(metadata={"static": True})
    dilation: int = dataclasses.field(metadata={"static": True})

    @property
    def domain(self) -> str:
        """Operands of its products."""
        return "float32"


@overload
def prepack(
    w: Float[Array, "taps cin cout"],
    scales: ConvScales,
    *,
    algorithm: str = "auto",
    stride: int = 1,
    dilation: int = 1,
    packed: bool | None = None,
) -> PackedConv: ...


@overload
def prepack(
    w: Float[Array, "taps cin cout"],
    scales: None = None,
    *,
    algorithm: str = "auto",
    stride: int = 1,
    dilation: int = 1,
    packed: bool | None = None,
) -> TransformedConv: ...


def prepack(
    w: Float[Array, "taps cin cout"],
    scales: ConvScales | None = None,
    *,
    algorithm: str = "auto",
    stride: int = 1,
    dilation: int = 1,
    packed: bool | None = None,
) -> PackedConv | TransformedConv:
    """Transform a filter once, for any number of calls of `winograd_conv1d`.

    Args:
      w: the filter.
      scales: from `calibrate`, or learned from there; without them the domain is float32.
      algorithm: of float32, "auto" for `choose_algorithm`; scales have their own.
      stride, dilation: of the convolution; a stride is folded into input channels.
      packed: lay the filter out for the C++ kernels; by default, if they are enabled. Every
        platform computes the same from either layout; without kernels the plain one is faster.
    Returns: operands that give what `winograd_conv1d` gives with `w`; with `scales`, bit for bit.
    Raises: ValueError for scales that do not fit the filter or are not positive, or for more input
      channels than an int32 sum can take; TypeError if `w` is not floating point.
    """
    if scales is None:
        return _pretransform(w, algorithm, stride, dilation)
    check_scales("prepack", scales)
    if algorithm not in ("auto", scales.algorithm):
        raise ValueError(f"prepack: the scales are of {scales.algorithm}, got {algorithm}")
    _check("prepack", w, scales, stride, dilation)
    if packed is None:
        packed = native.status().enabled and conv_kernel.serves(scales.algorithm)
    return _prepack(w, scales, stride=stride, dilation=dilation, packed=packed)


def transform_for(
    function: str,
    w: Float[Array, "taps cin cout"],
    scales: ConvScales,
    *,
    stride: int,
    dilation: int,
) -> PackedConv:
    """The operands with u still in float32, differentiable in `w` and `scales`.

    An input range finer than the operands is no quantizer to speak of: the noise of its step's
    gradient would be all there is, so it has none.
    """
    _check(function, w, scales, stride, dilation)
    return _transform(w, scales, stride=stride, dilation=dilation)


def _pretransform(w: Array, algorithm: str, stride: int, dilation: int) -> TransformedConv:
    check_filter("prepack", w)
    check_geometry("prepack", stride, dilation)
    taps, cin, cout = w.shape
    fold = folding(taps, stride, dilation)
    if algorithm == "auto":
        depth = cin * fold.frames
        algorithm = choose_algorithm(fold.taps, depth, cout, dilation=fold.dilation)
    check_algorithm("prepack", algorithm, fold.taps, fold.dilation)
    w = w.astype(jnp.float32)
    filters = [w] if algorithm == "direct" else _points(w, fold, algorithm)
    return TransformedConv(
        filters=tuple(filters),
        algorithm=algorithm,
        taps=taps,
        cin=cin,
        stride=stride,
        dilation=dilation,
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _points(w: Array, fold: Folding, algorithm: str) -> list[Array]:
    return transform_filter(fold_filter(w, fold), ALGORITHMS[algorithm])


def _check(function: str, w: Array, scales: ConvScales, stride: int, dilation: int) -> None:
    check_filter(function, w)
    check_geometry(function, stride, dilation)
    taps, cin, cout = w.shape
    fold = folding(taps, stride, dilation)
    check_algorithm(function, scales.algorithm, fold.taps, fold.dilation)
    check_scales_fit(function, scales, cin, cout)


@functools.partial(jax.jit, static_argnames=("stride", "dilation", "packed"))
def _prepack(w, scales, *, stride, dilation, packed) -> PackedConv:
    operands = _transform(w, scales, stride=stride, dilation=dilation)
    u = quantized_filter(operands.u, scales.filter_step, LARGEST_OPERAND[scales.domain])
    if packed:
        taps = folding(w.shape[0], stride, dilation).taps
        u = conv_kernel.pack_filter(u, tap_blocks=ALGORITHMS[scales.algorithm].tap_blocks(taps))
    return dataclasses.replace(operands, u=u, packed=packed)


@functools.partial(jax.jit, static_argnames=("stride", "dilation"))
def _transform(w, scales, *, stride, dilation) -> PackedConv:
    taps, cin, _ = w.shape
    fold = folding(taps, stride, dilation)
    input_step = scales.input_step
    if scales.input_limit > LARGEST_OPERAND[scales.domain]:
        input_step = lax.stop_gradient(input_step)
    w = w.astype(jnp.float32)
    if input_step.ndim:
        w = w * rounded(input_step / jnp.max(input_step))[:, None]
        input_step = jnp.tile(input_step, fold.frames)
    return PackedConv(
        u=transformed_filter(fold_filter(w, fold), scales.algorithm),
        input_step=input_step,
        point_step=scales.point_step,
        filter_step=scales.filter_step,
        algorithm=scales.algorithm,
        domain=scales.domain,
        input_limit=scales.input_limit,
        taps=taps,
        cin=cin,
        stride=stride,
        dilation=dilation,
        packed=False,
    )
