"""A convolution resolved once: what shapes and options decide, before any value is computed.

    filter [taps, cin, cout], options       ->  FilterPlan    all that `prepack` needs
    FilterPlan, signal [batch, length, cin] ->  ConvPlan      all that a call needs

Whatever a caller can get wrong is refused here, in the caller's words; what runs a plan runs
through, from padding to cropping, and asks no more questions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cmjax.primitives.convolution.choice import choose_algorithm
from cmjax.primitives.convolution.geometry import Folding, Padding, explicit_padding, folding
from cmjax.primitives.convolution.lengths import check_valid_range
from cmjax.primitives.convolution.ranges import filter_limit
from cmjax.primitives.convolution.scales import ConvScales, check_scales
from cmjax.primitives.convolution.toom_cook import ALGORITHMS, Algorithm

Shaped = Array | jax.ShapeDtypeStruct
"""What has a shape and a dtype; no value is read."""

INTEGER_DOMAINS = ("int8", "int16")
DOMAINS = ("float32", *INTEGER_DOMAINS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterPlan:
    """A filter and how it is convolved with, whatever the signal.

    Fields:
      taps, cin, cout: sizes of the filter as it was given.
      stride, dilation: of the convolution asked for.
      groups: groups of channels that do not meet; the filter has cin / groups input channels.
      algorithm: a name in `toom_cook.ALGORITHMS` that serves the folded filter.
      domain: "float32", "int8" or "int16": operands of the products.
    """

    taps: int
    cin: int
    cout: int
    stride: int
    dilation: int
    algorithm: str
    domain: str
    groups: int = 1

    @property
    def fold(self) -> Folding:
        """The convolution without stride that computes the same."""
        return folding(self.taps, self.stride, self.dilation)

    @property
    def form(self) -> Algorithm:
        """The algorithm itself."""
        return ALGORITHMS[self.algorithm]

    @property
    def tap_blocks(self) -> int:
        """Blocks of the algorithm's taps in which the folded filter is served."""
        return self.form.tap_blocks(self.fold.taps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvPlan:
    """One call: a filter's plan, and what the signal and the output add to it.

    Fields:
      filter: the filter's plan.
      padding: frames of zeros before and after the signal, negative for frames cut off.
      slope: of the activation max(y, slope * y): 1 none, 0 ReLU.
    """

    filter: FilterPlan
    padding: tuple[Any, Any]
    slope: float = 1.0


def plan_filter(
    function: str,
    w: Shaped,
    *,
    algorithm: str = "auto",
    domain: str | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    scales: ConvScales | None = None,
    min_sqnr_db: float | None = None,
    outputs: int | None = None,
    domains: tuple[str, ...] = DOMAINS,
) -> FilterPlan:
    """Resolve what depends on the filter alone.

    Args:
      function: name for errors.
      w: the filter, [taps, cin / groups, cout]; its shape and dtype are read.
      algorithm: a name, or "auto": that of the scales, else of `choose_algorithm`.
      domain: one of `domains`; default that of the scales, else the first of them.
      stride, dilation, groups: of the convolution.
      scales: steps that the filter is to be quantized with.
      min_sqnr_db: accuracy floor of "auto", in dB.
      outputs: output frames, if known. They count for "auto" in float32 only: integers have steps
        that outlive a call.
      domains: what is served.
    Raises: ValueError for shapes, names or numbers that cannot be served, saying what can;
      TypeError for a filter that is not floating point, or scales that are none.
    """
    _check_filter(function, w, groups=groups)
    _check_strides(function, stride, dilation)
    if scales is not None:
        check_scales(function, scales)
        domain = domain or scales.domain
        algorithm = scales.algorithm if algorithm == "auto" else algorithm
        if (domain, algorithm) != (scales.domain, scales.algorithm):
            raise ValueError(
                f"{function}: the scales are of {scales.algorithm} in {scales.domain}, and "
                f"{algorithm} in {domain} was asked for; calibrate for that"
            )
    domain = domain or domains[0]
    if domain not in domains:
        raise ValueError(f"{function}: domain must be one of {domains}, got {domain!r}")
    taps, of_group, cout = w.shape
    fold = folding(taps, stride, dilation)
    if algorithm == "auto":
        algorithm = choose_algorithm(
            fold.taps,
            of_group * fold.frames,
            max(cout // groups, 1),
            domain=domain,
            outputs=outputs if domain == "float32" else None,
            dilation=fold.dilation,
            min_sqnr_db=min_sqnr_db,
        )
    _check_algorithm(function, algorithm, fold)
    plan = FilterPlan(
        taps=taps,
        cin=of_group * groups,
        cout=cout,
        stride=stride,
        dilation=dilation,
        algorithm=algorithm,
        domain=domain,
        groups=groups,
    )
    if scales is not None:
        _check_scales_fit(function, scales, plan)
    if domain in INTEGER_DOMAINS:
        filter_limit(domain, plan.tap_blocks * of_group * fold.frames, function=function)
    return plan


def plan_conv(
    function: str,
    x: Shaped,
    w: Shaped | FilterPlan,
    *,
    algorithm: str = "auto",
    domain: str | None = None,
    stride: int | None = None,
    padding: Padding = "SAME",
    dilation: int | None = None,
    groups: int | None = None,
    bias: Array | None = None,
    activation: str | float | None = None,
    scales: ConvScales | None = None,
    min_sqnr_db: float | None = None,
    valid_range: Array | None = None,
    domains: tuple[str, ...] = DOMAINS,
) -> ConvPlan:
    """Resolve one call.

    Args:
      function: name for errors.
      x: the signal, [batch, length, cin]; of all arrays the shape and dtype are read, of steps that
        are known whether they are positive too.
      w: the filter, or the plan that it was prepared by. Options that such a plan has decided must
        be left out, or agree with it.
      domains: what is served.
      others: as of `winograd_conv1d`.
    Raises: as `plan_filter`.
    """
    slope = _slope(function, activation)
    if valid_range is not None:
        check_valid_range(function, valid_range, x.shape[:1])
    if isinstance(w, FilterPlan):
        _refuse_conflicts(function, w, algorithm, domain, stride, dilation, groups, scales)
        _check_signal(function, x, w.cin)
        length = x.shape[1]
        pads = explicit_padding(function, padding, length, w.taps, w.stride, w.dilation)
        _check_length(function, length, pads, w.fold)
        plan = w
    else:
        stride, dilation = 1 if stride is None else stride, 1 if dilation is None else dilation
        groups = 1 if groups is None else groups
        _check_signal(function, x)
        _check_filter(function, w, x.shape[2], groups=groups)
        _check_strides(function, stride, dilation)
        length, fold = x.shape[1], folding(w.shape[0], stride, dilation)
        pads = explicit_padding(function, padding, length, w.shape[0], stride, dilation)
        _check_length(function, length, pads, fold)
        outputs = x.shape[0] * ((length + sum(pads) - fold.extent) // stride + 1)
        plan = plan_filter(
            function,
            w,
            algorithm=algorithm,
            domain=domain,
            stride=stride,
            dilation=dilation,
            groups=groups,
            scales=scales,
            min_sqnr_db=min_sqnr_db,
            outputs=outputs if isinstance(outputs, int) and outputs else None,
            domains=domains,
        )
    if bias is not None:
        _check_bias(function, bias, plan.cout)
    return ConvPlan(filter=plan, padding=pads, slope=slope)


def _check_signal(function: str, x: Shaped, cin: int | None = None) -> None:
    if len(x.shape) != 3 or (cin is not None and x.shape[2] != cin):
        channels = "cin" if cin is None else cin
        raise ValueError(f"{function}: x must be [batch, length, {channels}], got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{function}: x must be floating point, got {x.dtype}")


def _check_filter(function: str, w: Shaped, cin: int | None = None, *, groups: int = 1) -> None:
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{function}: groups must be an integer of at least 1, got {groups!r}")
    if len(w.shape) != 3 or w.shape[0] < 1:
        raise ValueError(f"{function}: w must be [taps, cin, cout], got {w.shape}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{function}: w must be floating point, got {w.dtype}")
    if w.shape[2] % groups or (cin is not None and cin % groups):
        raise ValueError(
            f"{function}: groups={groups} must divide the channels of x and of the result, got "
            f"{w.shape[1] * groups if cin is None else cin} and {w.shape[2]}"
        )
    if cin is not None and w.shape[1] != cin // groups:
        of = "" if groups == 1 else f" in {groups} groups"
        raise ValueError(
            f"{function}: w must be [taps, {cin // groups}, cout] for x with {cin} channels{of}, "
            f"got {w.shape}"
        )


def _check_strides(function: str, stride: int, dilation: int) -> None:
    for argument, value in (("stride", stride), ("dilation", dilation)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{function}: {argument} must be an integer of at least 1, got {value}"
            )


def _check_length(function: str, length: Any, pads: tuple[Any, Any], fold: Folding) -> None:
    """Refuse a signal shorter, with its padding, than the filter reaches; symbolic ones pass."""
    frames = length + pads[0] + pads[1]
    if isinstance(frames, int) and frames < fold.extent:
        raise ValueError(
            f"{function}: the filter reaches over {fold.extent} frames, and x with its padding has "
            f"{frames}"
        )


def _check_algorithm(function: str, algorithm: str, fold: Folding) -> None:
    """Refuse an unknown name, and one that does not serve the filter; say which do."""
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"{function}: unknown algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}"
        )
    if fold.dilation != 1 and algorithm != "direct":
        raise ValueError(
            f"{function}: a dilated filter is served by algorithm='direct' alone, got {algorithm!r}"
        )
    ALGORITHMS[algorithm].tap_blocks(fold.taps)


def _check_scales_fit(function: str, scales: ConvScales, plan: FilterPlan) -> None:
    """Refuse scales whose shapes are not those of the filter."""
    points = plan.form.n
    shapes = {
        "input_step": ((), (plan.cin,)),
        "point_step": ((points,),),
        "filter_step": ((points, plan.cout),),
    }
    for field, allowed in shapes.items():
        shape = jnp.shape(getattr(scales, field))
        if shape not in allowed:
            raise ValueError(
                f"{function}: scales.{field} must have shape {' or '.join(map(str, allowed))} for "
                f"{scales.algorithm} with {plan.cin} input and {plan.cout} output channels, got "
                f"{shape}"
            )


def _check_bias(function: str, bias: Array, cout: int) -> None:
    if bias.shape != (cout,) or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"{function}: bias must be floating point [{cout}], got {bias.dtype}{list(bias.shape)}"
        )


def _slope(function: str, activation: str | float | None) -> float:
    if activation is None:
        return 1.0
    if activation == "relu":
        return 0.0
    if isinstance(activation, str) or not 0 <= activation <= 1:
        raise ValueError(
            f"{function}: activation must be None, 'relu' or a slope in [0, 1], got {activation!r}"
        )
    return float(activation)


def _refuse_conflicts(
    function, plan: FilterPlan, algorithm, domain, stride, dilation, groups, scales
):
    asked = {"domain": domain, "stride": stride, "dilation": dilation, "groups": groups}
    asked["algorithm"] = None if algorithm == "auto" else algorithm
    for field, value in asked.items():
        if value is not None and value != getattr(plan, field):
            raise ValueError(
                f"{function}: the filter was packed with {field}={getattr(plan, field)!r}, and "
                f"{value!r} was asked for; prepack it anew"
            )
    if scales is not None:
        raise ValueError(f"{function}: scales belong into prepack, with the filter")
