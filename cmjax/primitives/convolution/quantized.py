"""Convolution of small integers in a transformed domain, as one primitive: the deployed form.

    xi  = clip(round(x * (1 / input_step)), low, high)               integers, exact in float32
    v_p = clip(round((B^T xi)_p * (1 / point_step_p)), -V, V)        operands, int8 or int16
    y   = act(A^T (scale_p,o * sum_c u_p,c,o v_p,c) + bias)          int32 sums, float32 scales
    scale_p,o = input_step * point_step_p * filter_step_p,o

for one of the algorithms of `toom_cook`; direct convolution is F(1,1). The range of the input is
-R to R, or with a zero point z that of a two's complement integer around it, -R-1-z to R-z: the
integer stored is xi + z. Every rounding is named and
every sum of float32 has an order, so XLA and the C++ kernels give the same bits. What is not finite
gives NaN where it reaches and is nowhere else to be seen (`nonfinite`).

The derivative is that of the same formula in real numbers with `rsq_quantize` for each rounding:
straight-through inside the ranges, LSQ's rule for the steps. A filter in float32 takes part in it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import batching
from jaxtyping import Array, Float, Float32, Int, Int32

from cmjax.primitives.convolution import kernel as conv_kernel
from cmjax.primitives.convolution.grouped import grouped_products, of_group
from cmjax.primitives.convolution.lengths import check_valid_range, zero_padding_frames
from cmjax.primitives.convolution.nonfinite import (
    Reach,
    nan_where,
    reached,
    steps_of_finite,
    without_nonfinite,
)
from cmjax.primitives.convolution.ranges import (
    domain_of,
    filter_limit,
    input_range,
    largest_input_limit,
    largest_operand,
    operand_dtype,
)
from cmjax.primitives.convolution.rsq import requantize, rounded, rsq_quantize
from cmjax.primitives.convolution.straight_line import as_float32
from cmjax.primitives.convolution.tiles import (
    interleave,
    meet_blocks,
    mix_points,
    output_length,
    transform_instructions,
    windows,
)
from cmjax.primitives.convolution.toom_cook import ALGORITHMS
from cmjax.primitives.define import clamp, define, straight_through
from cmjax.program import Work, cost_rule, matmul_flops

_RANGE = 6  # which operand the valid range is, if there


def quantized_conv(
    x: Float[Array, "batch length cin"],
    u: Array,
    *,
    input_step: Float32[Array, "*cin"],
    point_step: Float32[Array, "points"],
    filter_step: Float32[Array, "points cout"],
    bias: Float32[Array, "cout"],
    algorithm: str,
    taps: int,
    dilation: int,
    padding: tuple[Any, Any],
    input_limit: int,
    operand_limit: int,
    slope: float,
    packed: bool,
    valid_range: Int32[Array, "batch 2"] | None = None,
    reach: Reach | None = None,
    groups: int = 1,
    zero_point: int = 0,
) -> Float32[Array, "batch out_length cout"]:
    """Bind the primitive, with stride 1: the module's formula, in the module's names.

    Args:
      x: signal, zeros beyond its ends.
      u: transformed filter, [points, tap blocks * cin / groups, cout]: its integers as int8 or
        int16, or its values in float32, to be rounded here; or with `packed` integers that
        `conv_kernel.pack_filter` laid out.
      input_step: value of an integer of x, scalar or [cin]. Steps per channel count in units of
        their largest, and the filter is that of channels scaled by `input_step / max(input_step)`.
      point_step, filter_step, bias: as in the formula.
      algorithm: a name in `toom_cook.ALGORITHMS`.
      taps: taps of the filter that u was made of.
      dilation: frames between taps; more than 1 with "direct" only.
      padding: frames of zeros before and after x.
      input_limit, operand_limit: R and V.
      slope: of the activation max(y, slope * y): 1 none, 0 ReLU.
      valid_range: first frame of each result that is no padding and the one behind its last,
        [start, stop); the frames outside are zero.
      reach: frames that an output is made of, if x is folded; by default its taps say.
      groups: groups of channels that do not meet; channel c of a folded frame is of group
        `c * groups // cin`.
      zero_point: the integer that stands for 0, -R-1 to R; 0 is a range symmetric to zero. In
        direct convolution, where operands are the integers of x, they are then held in 16 bits.
    Raises: ValueError or TypeError for operands that do not fit each other.
    """
    u = u.astype(jnp.float32) if jnp.issubdtype(u.dtype, jnp.floating) else u
    floats = (jnp.asarray(a, jnp.float32) for a in (input_step, point_step, filter_step, bias))
    operands = [x.astype(jnp.float32), u, *floats]
    if valid_range is not None:
        operands.append(valid_range)
    params = {
        "algorithm": algorithm,
        "taps": taps,
        "dilation": dilation,
        "padding": tuple(padding),
        "input_limit": input_limit,
        "operand_limit": operand_limit,
        "slope": float(slope),
        "packed": packed,
        "reach": Reach(1, 0, dilation, taps) if reach is None else reach,
        "groups": groups,
        "zero_point": zero_point,
    }
    _check(*map(jax.typeof, operands), **params)
    return quantized_conv_p.bind(*operands, **params)


def quantized_filter(
    u: Array,
    filter_step: Float32[Array, "points cout"],
    operand_limit: int,
    *,
    largest: int | None = None,
) -> Int[Array, "points depth cout"]:
    """A transformed filter as integers of the operands' dtype; one of integers stays as it is.

    Args:
      u: the filter, floating point or integers.
      filter_step: value of one integer; what is not finite becomes 0.
      operand_limit: V, of the domain.
      largest: largest |v|, if not V.
    """
    largest = operand_limit if largest is None else largest
    if jnp.issubdtype(u.dtype, jnp.floating):
        limit = float(filter_limit(domain_of(operand_limit), u.shape[1], operand=largest))
        u = without_nonfinite(u * rounded(1 / filter_step)[:, None, :])
        u = clamp(-limit, _round(u), limit)
    return u.astype(operand_dtype(largest))


def _reference(x, u, input_step, point_step, filter_step, bias, *valid_range, **params):
    form = ALGORITHMS[params["algorithm"]]
    blocks, largest = form.tap_blocks(params["taps"]), _largest_operand(params)
    if params["packed"]:
        u = conv_kernel.unpack_filter(u, tap_blocks=blocks, cin=x.shape[-1], cout=bias.shape[-1])
    inverse_step, requant, scale = _factors(input_step, point_step, filter_step, u)
    operand = operand_dtype(largest)
    u = quantized_filter(u, filter_step, params["operand_limit"], largest=largest)
    low, high = input_range(params["input_limit"], params["zero_point"])
    hit = reached(x, params["reach"], outputs=_length(x, params), **_pick(params, _GROUPED))
    xi = clamp(low, _round(without_nonfinite(x) * inverse_step), high)
    columns, tiles = windows(xi, form, **_pick(params, _WINDOWS))
    v = [
        clamp(-largest, _round(point * requant[p]), largest).astype(operand)
        for p, point in enumerate(form.bt_program.apply(columns))
    ]
    sums = _products(v, u, tiles, blocks, params, jnp.int32)
    products = rounded(sums.astype(jnp.float32) * scale[:, None, None, :])
    y = form.at_program.apply(list(products), lambda c, m: rounded(as_float32(c) * m))
    y = interleave(y, _length(x, params)) + bias
    if params["slope"] != 1:
        y = jnp.maximum(y, np.float32(params["slope"]) * y)
    y = jnp.where(jnp.any(jnp.isnan(scale), axis=0), jnp.nan, nan_where(y, hit))
    return zero_padding_frames(y, *valid_range) if valid_range else y


def _products(v, u, tiles, blocks, params, dtype):
    """[points, batch, tiles, cout]; `v` is a list over points of transformed windows."""
    meet = functools.partial(meet_blocks, tiles=tiles, blocks=blocks, dilation=params["dilation"])
    return grouped_products(
        jnp.stack([meet(point) for point in v]),
        u,
        groups=params["groups"],
        channels=v[0].shape[-1] // params["reach"].frames,
        dtype=dtype,
    )


def _native(x, u, input_step, point_step, filter_step, bias, *valid_range, **params):
    algorithm, groups = params["algorithm"], params["groups"]
    channels = x.shape[-1] // params["reach"].frames
    few = groups > _MOST_GROUPS or (groups > 1 and channels < groups * _FEWEST_CHANNELS)
    if few or not conv_kernel.serves(algorithm):
        return _reference(x, u, input_step, point_step, filter_step, bias, *valid_range, **params)
    blocks, largest = ALGORITHMS[algorithm].tap_blocks(params["taps"]), _largest_operand(params)
    inverse_step, requant, scale = _factors(input_step, point_step, filter_step, u)
    inverse_step = jnp.broadcast_to(inverse_step, x.shape[-1:])
    if not params["packed"]:
        u = quantized_filter(u, filter_step, params["operand_limit"], largest=largest)

    def run(x, u, inverse_step, scale, bias):
        return conv_kernel.conv1d(
            x,
            u if params["packed"] else conv_kernel.pack_filter(u, tap_blocks=blocks),
            algorithm=algorithm,
            tap_blocks=blocks,
            dilation=params["dilation"],
            padding=params["padding"],
            out_length=_length(x, params),
            inverse_step=inverse_step,
            requant=requant,
            scale=scale,
            bias=bias,
            input_limit=params["input_limit"],
            zero_point=params["zero_point"],
            operand_limit=largest,
            slope=params["slope"],
            valid_range=valid_range[0] if valid_range else None,
            reach=params["reach"],
        )

    if groups == 1:
        return run(x, u, inverse_step, scale, bias)
    signal = functools.partial(of_group, groups=groups, channels=channels)
    outputs = functools.partial(of_group, groups=groups, channels=bias.shape[-1])
    results = [
        run(
            signal(x, g),
            outputs(u, g),
            signal(inverse_step, g),
            outputs(scale, g),
            outputs(bias, g),
        )
        for g in range(groups)
    ]
    return jnp.concatenate(results, axis=-1)


def _factors(input_step, point_step, filter_step, u):
    """What is multiplied with: of the input, of transformed inputs, of sums."""
    filter_step = steps_of_finite(filter_step, u)
    scale = rounded(rounded(jnp.max(input_step) * point_step)[:, None] * filter_step)
    scale = jnp.where(jnp.isnan(filter_step), jnp.nan, scale)
    return rounded(1 / input_step), rounded(1 / point_step), scale


def _largest_operand(params):
    limits = (params[key] for key in ("input_limit", "operand_limit", "zero_point"))
    return largest_operand(params["algorithm"], *limits)


def _round(z):
    return lax.round(z, lax.RoundingMethod.TO_NEAREST_EVEN)


def _pick(params, keys):
    return {key: params[key] for key in keys}


_WINDOWS, _GROUPED = ("taps", "dilation", "padding"), ("padding", "groups")
# A kernel call per group: of so many, and of so many channels each, else XLA runs.
_MOST_GROUPS, _FEWEST_CHANNELS = 16, 16


def _length(x, params):
    return output_length(x.shape[1], params["padding"], params["taps"], params["dilation"])


def _check(x, u, input_step, point_step, filter_step, bias, *valid_range, **params):
    name = "winograd_conv1d"
    form = ALGORITHMS[params["algorithm"]]
    blocks = form.tap_blocks(params["taps"])
    if x.ndim != 3:
        raise ValueError(f"{name}: x must be [batch, length, cin], got {x.shape}")
    cin, cout = x.shape[-1], bias.shape[-1]
    groups, frames = params["groups"], params["reach"].frames
    if groups < 1 or cin % (groups * frames) or cout % groups:
        raise ValueError(
            f"{name}: groups must divide the channels of x and of the result, got groups={groups} "
            f"for {cin // frames} and {cout}"
        )
    expected = {
        "input_step": (input_step, (cin,) if input_step.ndim else ()),
        "point_step": (point_step, (form.n,)),
        "filter_step": (filter_step, (form.n, cout)),
        "bias": (bias, (cout,)),
    }
    if not params["packed"]:
        expected["u"] = (u, (form.n, blocks * cin // groups, cout))
    for argument, (operand, shape) in expected.items():
        if operand.shape != shape:
            raise ValueError(
                f"{name}: {argument} must have shape {shape} for {form.name}, "
                f"{params['taps']} taps, {cin} input and {cout} output channels, "
                f"got {operand.shape}"
            )
    if params["dilation"] != 1 and form.name != "direct":
        raise ValueError(
            f"{name}: dilation {params['dilation']} needs algorithm='direct', got {form.name}"
        )
    if not 1 <= params["input_limit"] <= largest_input_limit(form.name):
        raise ValueError(
            f"{name}: input_limit must lie in 1..{largest_input_limit(form.name)} for {form.name}, "
            f"got {params['input_limit']}"
        )
    if not 0 <= params["slope"] <= 1:
        raise ValueError(f"{name}: activation slope must lie in [0, 1], got {params['slope']}")
    if valid_range:
        check_valid_range(name, valid_range[0], x.shape[:1])
    input_range(params["input_limit"], params["zero_point"])
    domain = domain_of(params["operand_limit"])
    filter_limit(domain, blocks * cin // groups, operand=_largest_operand(params))


def _surrogate(x, u, input_step, point_step, filter_step, bias, *valid_range, **params):
    """The formula before the activation in real numbers, each rounding a fake quantization."""
    form = ALGORITHMS[params["algorithm"]]
    blocks = form.tap_blocks(params["taps"])
    if params["packed"]:
        u = conv_kernel.unpack_filter(u, tap_blocks=blocks, cin=x.shape[-1], cout=bias.shape[-1])
    largest = _largest_operand(params)
    if jnp.issubdtype(u.dtype, jnp.floating):
        domain = domain_of(params["operand_limit"])
        limit = filter_limit(domain, u.shape[1], operand=largest)
        u = rsq_quantize(u, filter_step[:, None, :], limit=limit)
    else:
        u = u.astype(jnp.float32) * filter_step[:, None, :]
    axis = -1 if input_step.ndim else None
    unit = jnp.max(input_step)
    span = input_range(params["input_limit"], params["zero_point"])
    x = rsq_quantize(x, input_step, limit=span, axis=axis)
    if input_step.ndim:
        x = x * (unit / input_step)
    columns, tiles = windows(x, form, **_pick(params, _WINDOWS))
    points = mix_points(form.bt, jnp.stack(columns))
    step = (unit * point_step)[:, None, None, None]
    v = requantize(points, step, largest)
    products = _products(list(v), u, tiles, blocks, params, jnp.float32)
    y = interleave(list(mix_points(form.at, products)), _length(x, params)) + bias
    return zero_padding_frames(y, *valid_range) if valid_range else y


def _jvp(p, primals, tangents, **params):
    real = functools.partial(_surrogate, **params)
    out, tangent = straight_through(real, p, primals, tangents, params)
    if params["slope"] != 1:
        tangent = jnp.where(out > 0, tangent, params["slope"] * tangent)
    return out, tangent


def _batch(args, dims, **params):
    """A batch of signals joins the batch axis; filters or scales of their own run in turn."""
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    x, *shared = args[:_RANGE]
    if all(d is None for d in dims[1:_RANGE]):
        of_signals = [(x, dims[0]), *zip(args[_RANGE:], dims[_RANGE:], strict=True)]
        moved = [batching.bdim_at_front(a, d, size) for a, d in of_signals]
        x, *valid_range = (a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]) for a in moved)
        out = quantized_conv_p.bind(x, *shared, *valid_range, **params)
        return out.reshape(*moved[0].shape[:2], *out.shape[1:]), 0
    mapped = tuple(
        batching.bdim_at_front(a, d, size) if d is not None else None
        for a, d in zip(args, dims, strict=True)
    )

    def one(row):
        operands = [a if r is None else r for a, r in zip(args, row, strict=True)]
        return quantized_conv_p.bind(*operands, **params)

    return lax.map(one, mapped), 0


quantized_conv_p = define(
    "cm_quantized_conv1d", _reference, check=_check, jvp=_jvp, batch=_batch, native=_native
)


# Vector instructions around the products: per input frame scale, round and clip; per operand
# rescale, round, clip and cast; per sum cast and scale; per output bias and activation.
_QUANTIZE, _REQUANTIZE, _RESCALE, _FINISH = 3.0, 4.0, 2.0, 3.0


@cost_rule(quantized_conv_p)
def _cost(
    x, u, input_step, point_step, filter_step, bias, *valid_range, out, mesh, **params
) -> Work:
    """Products on the cube cores, saved by the algorithm; its transforms on the vector cores, and
    there too the products of a depthwise convolution, one multiply-add each."""
    form = ALGORITHMS[params["algorithm"]]
    cin, cout, groups = x.shape[-1], bias.shape[-1], params["groups"]
    tiles = out[0].size / cout / form.m
    depth = cin / groups * float(form.tap_blocks(params["taps"]))
    macs = tiles * depth * cout * float(form.n)
    to_operands = transform_instructions(form.bt_program) + _REQUANTIZE * form.n
    to_outputs = transform_instructions(form.at_program) + _RESCALE * form.n
    instructions = (
        x.size * _QUANTIZE
        + tiles * cin * to_operands
        + tiles * cout * to_outputs
        + out[0].size * _FINISH
    )
    if groups > 1 and cin == groups * params["reach"].frames:
        return Work(vector_bytes=(instructions + macs) * 4.0, flops=macs * 2.0)
    operand = jnp.int8 if params["operand_limit"] <= 127 else jnp.int16
    return Work(
        vector_bytes=instructions * 4.0,
        flops=macs * 2.0,
        **matmul_flops(operand, macs * 2.0, depth),
    )
