"""One-dimensional convolution by short algorithms: float32, int8 and int16 operands.

    y = A^T [(G w) * (B^T x)]                 float32 (Winograd 1980; Lavin and Gray, 2016)
    y = A^T [scale * (u v)],  u, v integers   int8, int16: see `quantized_conv`

In the integer domains signals and filters are quantized *after* their transforms, each point with
a step of its own, as Yao et al. (arXiv:2010.14841) and MNN's engine need for int8 Winograd in
speech recognition. Called with a float filter and scales the function is differentiable in all of
them and its value is the deployed integer pipeline's, bit for bit: that is training with RSQ.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from cmjax.primitives.convolution.checks import (
    check_algorithm,
    check_domain,
    check_geometry,
    check_length,
    check_signal,
    check_signal_and_filter,
)
from cmjax.primitives.convolution.choice import choose_algorithm
from cmjax.primitives.convolution.geometry import (
    Padding,
    explicit_padding,
    fold_filter,
    fold_input,
    folding,
)
from cmjax.primitives.convolution.lengths import check_span, zero_outside
from cmjax.primitives.convolution.packed import PackedConv, TransformedConv, transform_for
from cmjax.primitives.convolution.quantized import LARGEST_OPERAND, quantized_conv
from cmjax.primitives.convolution.scales import ConvScales, calibrate, check_scales
from cmjax.primitives.convolution.tiles import (
    interleave,
    meet_blocks,
    output_length,
    transform_filter,
    transform_instructions,
    windows,
)
from cmjax.primitives.convolution.toom_cook import ALGORITHMS
from cmjax.primitives.define import define
from cmjax.program import Work, cost_rule

DOMAINS = ("float32", "int8", "int16")


def winograd_conv1d(
    x: Float[Array, "batch length cin"],
    w: Float[Array, "taps cin cout"] | PackedConv | TransformedConv,
    *,
    algorithm: str = "auto",
    domain: str | None = None,
    stride: int | None = None,
    padding: Padding = "SAME",
    dilation: int | None = None,
    bias: Float[Array, "cout"] | None = None,
    activation: str | float | None = None,
    scales: ConvScales | None = None,
    min_sqnr_db: float | None = None,
    span: Int32[Array, "batch 2"] | None = None,
) -> Float[Array, "batch out_length cout"]:
    """Convolution of `x` with `w`, as `lax.conv_general_dilated` has it, layout NWC x WIO -> NWC.

    Args:
      x: signals.
      w: the filter, or what `prepack` made of it.
      algorithm: a name in `toom_cook.ALGORITHMS`, or "auto" for `choose_algorithm` under
        `min_sqnr_db`; scales and packed filters carry their own. "direct" in float32 is
        `lax.conv_general_dilated`.
      domain: "float32", "int8" or "int16": operands of the products. Default: that of the scales or
        the packed filter, else float32.
      stride: any; folded into channels. Default 1, or that of the packed filter.
      padding: "SAME", "SAME_LOWER", "VALID", (low, high) or [(low, high)].
      dilation: as `rhs_dilation`; served by direct convolution. Default as for the stride.
      bias: added to the output.
      activation: None, "relu", or the slope of a leaky ReLU below zero.
      scales: of the integer domains, from `calibrate`. Without them each call takes its steps from
        the largest magnitudes of its own x and w.
      min_sqnr_db: accuracy floor of "auto", in dB.
      span: where every result exists: its first frame and the one behind its last, as `lengths` of
        a padded batch say. The frames outside are zero. Default: all exist.
    Returns: dtype of `x`.
    Raises: ValueError for shapes, names or numbers that cannot be served, saying what can;
      TypeError for operands that are not floating point.
    Gradient: of float32, the exact one; of the integer domains straight-through in `x`, `w` and
      `bias` (what saturates passes none) and LSQ's rule in the scales.
    """
    name = "winograd_conv1d"
    x = jnp.asarray(x)
    slope = _slope(name, activation)
    if span is not None:
        span = jnp.asarray(span)
        check_span(name, span, x.shape[:1])
    if isinstance(w, PackedConv | TransformedConv):
        _refuse_conflicts(name, w, algorithm, domain, stride, dilation, scales)
        check_signal(name, x, w.cin)
        if isinstance(w, PackedConv):
            return _integer(name, x, w, padding, bias, slope, span)
        return _finish(name, x, _float(name, x, w, padding), bias, slope, span)
    w = jnp.asarray(w)
    stride = 1 if stride is None else stride
    dilation = 1 if dilation is None else dilation
    check_signal_and_filter(name, x, w)
    check_geometry(name, stride, dilation)
    if scales is not None:
        check_scales(name, scales)
        domain = domain or scales.domain
        algorithm = scales.algorithm if algorithm == "auto" else algorithm
        if (domain, algorithm) != (scales.domain, scales.algorithm):
            raise ValueError(
                f"{name}: the scales are of {scales.algorithm} in {scales.domain}, and {algorithm} "
                f"in {domain} was asked for; calibrate for that"
            )
    domain = domain or "float32"
    check_domain(name, domain, DOMAINS)
    pads = explicit_padding(name, padding, x.shape[1], w.shape[0], stride, dilation)
    if domain == "float32":
        operands = _prepared(name, x, w, algorithm, stride, pads, dilation, min_sqnr_db)
        return _finish(name, x, _float(name, x, operands, pads), bias, slope, span)
    if scales is None:
        scales = calibrate(
            x,
            w,
            algorithm=algorithm,
            domain=domain,  # pyright: ignore[reportArgumentType]
            stride=stride,
            padding=pads,
            dilation=dilation,
            method="max",
            min_sqnr_db=min_sqnr_db,
        )
        scales = lax.stop_gradient(scales)
    operands = transform_for(name, w, scales, stride=stride, dilation=dilation)
    return _integer(name, x, operands, pads, bias, slope, span)


def int8_conv1d(
    x: Float[Array, "batch length cin"],
    w: Float[Array, "taps cin cout"],
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    dilation: int = 1,
    bias: Float[Array, "cout"] | None = None,
    activation: str | float | None = None,
    scales: ConvScales | None = None,
) -> Float[Array, "batch out_length cout"]:
    """Direct convolution with int8 operands: `winograd_conv1d` with algorithm "direct".

    The baseline that fast algorithms are measured against: one step for the input, one per output
    channel for the filter, exact int32 sums. Arguments as there.
    """
    return winograd_conv1d(
        x,
        w,
        algorithm="direct",
        domain="int8",
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=bias,
        activation=activation,
        scales=scales,
    )


def _integer(name, x, operands: PackedConv, padding, bias, slope, span):
    fold = folding(operands.taps, operands.stride, operands.dilation)
    pads = explicit_padding(
        name, padding, x.shape[1], operands.taps, operands.stride, operands.dilation
    )
    check_length(name, x, pads, fold.extent)
    cout = operands.filter_step.shape[-1]
    folded, pads = fold_input(x.astype(jnp.float32), pads, fold)
    y = quantized_conv(
        folded,
        operands.u,
        input_step=operands.input_step,
        point_step=operands.point_step,
        filter_step=operands.filter_step,
        bias=jnp.zeros((cout,), jnp.float32) if bias is None else _bias(name, bias, cout),
        algorithm=operands.algorithm,
        taps=fold.taps,
        dilation=fold.dilation,
        padding=pads,
        input_limit=operands.input_limit,
        operand_limit=LARGEST_OPERAND[operands.domain],
        slope=slope,
        packed=operands.packed,
        span=span,
    )
    return y.astype(x.dtype)


def _prepared(name, x, w, algorithm, stride, pads, dilation, min_sqnr_db) -> TransformedConv:
    """A filter that is transformed only inside the primitive."""
    fold = folding(w.shape[0], stride, dilation)
    check_length(name, x, pads, fold.extent)
    if algorithm == "auto":
        outputs = x.shape[0] * ((x.shape[1] + pads[0] + pads[1] - fold.extent) // stride + 1)
        algorithm = choose_algorithm(
            fold.taps,
            w.shape[1] * fold.frames,
            w.shape[2],
            outputs=outputs if isinstance(outputs, int) and outputs else None,
            dilation=fold.dilation,
            min_sqnr_db=min_sqnr_db,
        )
    check_algorithm(name, algorithm, fold.taps, fold.dilation)
    return TransformedConv(
        filters=(w.astype(jnp.float32),),
        algorithm=algorithm,
        taps=w.shape[0],
        cin=w.shape[1],
        stride=stride,
        dilation=dilation,
    )


def _float(name, x, operands: TransformedConv, padding):
    taps, stride, dilation = operands.taps, operands.stride, operands.dilation
    fold = folding(taps, stride, dilation)
    pads = explicit_padding(name, padding, x.shape[1], taps, stride, dilation)
    check_length(name, x, pads, fold.extent)
    x, filters = x.astype(jnp.float32), operands.filters
    if operands.algorithm == "direct":
        return lax.conv_general_dilated(
            x,
            operands.filters[0],
            (stride,),
            [pads],
            rhs_dilation=(dilation,),
            dimension_numbers=_LAYOUT,
        )
    transformed = len(filters) > 1
    if not transformed:
        filters = (fold_filter(operands.filters[0], fold),)
    folded, pads = fold_input(x, pads, fold)
    return winograd_p.bind(
        folded,
        *filters,
        algorithm=operands.algorithm,
        taps=fold.taps,
        padding=tuple(pads),
        transformed=transformed,
    )


def _finish(name, x, y, bias, slope, span):
    if bias is not None:
        y = y + _bias(name, bias, y.shape[2])
    y = (y if slope == 1 else jnp.where(y > 0, y, slope * y)).astype(x.dtype)
    return y if span is None else zero_outside(y, span)


_LAYOUT = ("NWC", "WIO", "NWC")


def _reference(x, *filters, algorithm, taps, padding, transformed):
    form = ALGORITHMS[algorithm]
    columns, tiles = windows(x, form, taps=taps, dilation=1, padding=padding)
    u = filters if transformed else transform_filter(filters[0], form)
    products = []
    for point, filter_point in zip(form.bt_program.apply(columns), u, strict=True):
        seen = meet_blocks(point, tiles, blocks=form.tap_blocks(taps), dilation=1)
        rows = seen.reshape(-1, seen.shape[-1])  # one large product; XLA batches smaller ones worse
        products.append((rows @ filter_point).reshape(*seen.shape[:2], -1))
    outputs = form.at_program.apply(products)
    return interleave(outputs, output_length(x.shape[1], padding, taps, 1))


def _batch(args, dims, **params):
    """A batch of signals joins the batch axis; filters of their own are mapped by XLA."""
    if any(d is not None for d in dims[1:]):
        return jax.vmap(functools.partial(_reference, **params), in_axes=dims)(*args), 0
    x = jnp.moveaxis(args[0], dims[0], 0)
    out = winograd_p.bind(x.reshape(-1, *x.shape[2:]), *args[1:], **params)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


winograd_p = define("cm_winograd_conv1d", _reference, batch=_batch)


@cost_rule(winograd_p)
def _cost(x, *filters, out, mesh, algorithm, taps, padding, transformed) -> Work:
    """Products on the cube cores, saved by the algorithm; its transforms on the vector cores."""
    form = ALGORITHMS[algorithm]
    cin, cout = x.shape[2], filters[0].shape[-1]
    blocks = form.tap_blocks(taps)
    tiles = out[0].size / cout / form.m
    flops = tiles * cin * cout * (2.0 * form.n * blocks)
    instructions = tiles * cin * transform_instructions(form.bt_program)
    instructions = instructions + tiles * cout * transform_instructions(form.at_program)
    if not transformed:
        instructions += cin * cout * (transform_instructions(form.g_program) * blocks)
    return Work(
        vector_bytes=instructions * 4.0,
        flops=flops + instructions,
        cube_flops_32bit=flops,
    )


def _slope(name: str, activation: str | float | None) -> float:
    if activation is None:
        return 1.0
    if activation == "relu":
        return 0.0
    if isinstance(activation, str) or not 0 <= activation <= 1:
        raise ValueError(
            f"{name}: activation must be None, 'relu' or a slope in [0, 1], got {activation!r}"
        )
    return float(activation)


def _bias(name: str, bias: Array, cout: int) -> Array:
    bias = jnp.asarray(bias)
    if bias.shape != (cout,) or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"{name}: bias must be floating point [{cout}], got {bias.dtype}{list(bias.shape)}"
        )
    return bias.astype(jnp.float32)


def _refuse_conflicts(
    name, packed: PackedConv | TransformedConv, algorithm, domain, stride, dilation, scales
):
    asked = {"domain": domain, "stride": stride, "dilation": dilation}
    asked["algorithm"] = None if algorithm == "auto" else algorithm
    for field, value in asked.items():
        if value is not None and value != getattr(packed, field):
            raise ValueError(
                f"{name}: the filter was packed with {field}={getattr(packed, field)!r}, and "
                f"{value!r} was asked for; prepack it anew"
            )
    if scales is not None:
        raise ValueError(f"{name}: scales belong into prepack, with the filter")
