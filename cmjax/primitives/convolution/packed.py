"""A filter made ready for the integer convolution: transformed, quantized and laid out.

u = clip(round((G w) / filter_step)),    scale = input_step * point_step * filter_step
"""

import dataclasses
import functools
from typing import overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from cmjax import native
from cmjax.primitives.convolution import kernel as conv_kernel
from cmjax.primitives.convolution.floating import TransformedConv, transformed
from cmjax.primitives.convolution.geometry import fold_filter, fold_input
from cmjax.primitives.convolution.nonfinite import Reach, steps_of_finite
from cmjax.primitives.convolution.plan import ConvPlan, FilterPlan, plan_filter
from cmjax.primitives.convolution.quantized import quantized_conv, quantized_filter
from cmjax.primitives.convolution.ranges import LARGEST_OPERAND, largest_operand
from cmjax.primitives.convolution.rsq import rounded
from cmjax.primitives.convolution.scales import ConvScales
from cmjax.primitives.convolution.tiles import transform_filter_rounded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedConv:
    """What `prepack` makes of a filter and its scales; a pytree, for `winograd_conv1d` alone.

    Fields:
      u: the transformed filter as `quantized_conv` takes it.
      input_step, point_step, filter_step: of the scales, the first for folded channels.
      input_limit, zero_point: of the scales.
      plan: of the filter.
      packed: u is `kernel.pack_filter`'s.
    """

    u: Array
    input_step: Float32[Array, "*folded_cin"]
    point_step: Float32[Array, "points"]
    filter_step: Float32[Array, "points cout"]
    input_limit: int = dataclasses.field(metadata={"static": True})
    plan: FilterPlan = dataclasses.field(metadata={"static": True})
    packed: bool = dataclasses.field(metadata={"static": True})
    zero_point: int = dataclasses.field(default=0, metadata={"static": True})


@overload
def prepack(
    w: Float[Array, "taps of_group cout"],
    scales: ConvScales,
    *,
    algorithm: str = "auto",
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    packed: bool | None = None,
) -> PackedConv: ...


@overload
def prepack(
    w: Float[Array, "taps of_group cout"],
    scales: None = None,
    *,
    algorithm: str = "auto",
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    packed: bool | None = None,
) -> TransformedConv: ...


def prepack(
    w: Float[Array, "taps of_group cout"],
    scales: ConvScales | None = None,
    *,
    algorithm: str = "auto",
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    packed: bool | None = None,
) -> PackedConv | TransformedConv:
    """Transform a filter once, for any number of calls of `winograd_conv1d`.

    Args:
      w: the filter.
      scales: from `calibrate`, or learned from there; without them the domain is float32.
      algorithm: of float32, "auto" for `choose_algorithm`; scales have their own.
      stride, dilation, groups: of the convolution; a stride is folded into input channels.
      packed: lay the filter out for the C++ kernels; by default, if they are enabled. Every
        platform computes the same from either layout; without kernels the plain one is faster.
    Returns: operands that give what `winograd_conv1d` gives with `w`; with `scales`, bit for bit.
    Raises: ValueError for scales that do not fit the filter or are not positive, or for more input
      channels than an int32 sum can take; TypeError if `w` is not floating point.
    Example: the filter is transformed once, and the result is that of the filter.

      >>> from cmjax.primitives.convolution.winograd import winograd_conv1d
      >>> x, w = jnp.arange(12.0).reshape(1, 6, 2), jnp.ones((3, 2, 4)) / 6
      >>> ready = prepack(w, algorithm="F(2,3)")
      >>> len(ready.filters), ready.plan.algorithm
      (4, 'F(2,3)')
      >>> bool((winograd_conv1d(x, ready) == winograd_conv1d(x, w, algorithm="F(2,3)")).all())
      True
    """
    w = jnp.asarray(w)
    plan = plan_filter(
        "prepack",
        w,
        algorithm=algorithm,
        domain=None if scales is not None else "float32",
        stride=stride,
        dilation=dilation,
        groups=groups,
        scales=scales,
    )
    if scales is None:
        return transformed(w, plan)
    if packed is None:
        packed = native.status().enabled and conv_kernel.serves(plan.algorithm) and groups == 1
    if packed and groups != 1:
        raise ValueError(f"prepack: packed=True is for one group, got groups={groups}")
    return _prepack(w, scales, plan=plan, packed=packed)


@functools.partial(jax.jit, static_argnames=("plan",))
def quantizable(
    w: Float[Array, "taps of_group cout"], scales: ConvScales, *, plan: FilterPlan
) -> PackedConv:
    """The operands with u still in float32, differentiable in `w` and `scales`.

    An input range finer than the operands is no quantizer to speak of: the noise of its step's
    gradient would be all there is, so it has none.
    """
    fold = plan.fold
    input_step, point_step, filter_step = (
        step.astype(jnp.float32)
        for step in (scales.input_step, scales.point_step, scales.filter_step)
    )
    if scales.input_limit > LARGEST_OPERAND[plan.domain]:
        input_step = lax.stop_gradient(input_step)
    w = w.astype(jnp.float32)
    if input_step.ndim:
        relative = rounded(input_step / jnp.max(input_step)).reshape(plan.groups, -1)
        w = w * jnp.repeat(relative.T, plan.cout // plan.groups, axis=1)
        input_step = jnp.tile(input_step, fold.frames)
    return PackedConv(
        u=transform_filter_rounded(fold_filter(w, fold), plan.algorithm),
        input_step=input_step,
        point_step=point_step,
        filter_step=filter_step,
        input_limit=scales.input_limit,
        zero_point=scales.zero_point,
        plan=plan,
        packed=False,
    )


def integer_conv(
    x: Float[Array, "batch length cin"],
    operands: PackedConv,
    plan: ConvPlan,
    *,
    bias: Float[Array, "cout"] | None = None,
    valid_range: Int32[Array, "batch 2"] | None = None,
) -> Float[Array, "batch out_length cout"]:
    """Run a plan in integers: fold, and all the rest in `quantized_conv`.

    Args: as of `float_conv`, with a filter for integers.
    """
    fold, cout = operands.plan.fold, operands.plan.cout
    folded, padding = fold_input(x.astype(jnp.float32), plan.padding, fold)
    y = quantized_conv(
        folded,
        operands.u,
        input_step=operands.input_step,
        point_step=operands.point_step,
        filter_step=operands.filter_step,
        bias=jnp.zeros((cout,), jnp.float32) if bias is None else bias.astype(jnp.float32),
        algorithm=operands.plan.algorithm,
        taps=fold.taps,
        dilation=fold.dilation,
        padding=padding,
        input_limit=operands.input_limit,
        operand_limit=LARGEST_OPERAND[operands.plan.domain],
        slope=plan.slope,
        packed=operands.packed,
        valid_range=valid_range,
        reach=Reach.of(fold),
        groups=operands.plan.groups,
        zero_point=operands.zero_point,
    )
    return y.astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("plan", "packed"))
def _prepack(w, scales, *, plan: FilterPlan, packed: bool) -> PackedConv:
    operands = quantizable(w, scales, plan=plan)
    limit = LARGEST_OPERAND[plan.domain]
    largest = largest_operand(plan.algorithm, scales.input_limit, limit, scales.zero_point)
    u = quantized_filter(operands.u, scales.filter_step, limit, largest=largest)
    if packed:
        u = conv_kernel.pack_filter(u, tap_blocks=plan.tap_blocks)
    filter_step = steps_of_finite(scales.filter_step, operands.u)
    return dataclasses.replace(operands, u=u, filter_step=filter_step, packed=packed)
