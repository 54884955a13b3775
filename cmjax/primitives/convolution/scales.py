"""Steps of a convolution's quantizers, and how to find them from samples.

    x ~ input_step * xi,   B^T xi ~ point_step * v,   G w ~ filter_step * u

One step per input (or input channel), per point of the transform for signals, and per point and
output channel for filters: transformed values of different points differ in size by the growth of
their rows, and one step for all of them is what costs int8 Winograd its accuracy.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from cmjax.primitives.convolution.checks import (
    check_algorithm,
    check_domain,
    check_geometry,
    check_length,
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
from cmjax.primitives.convolution.quantized import (
    LARGEST_OPERAND,
    filter_limit,
    largest_input_limit,
)
from cmjax.primitives.convolution.rsq import check_steps, rounded
from cmjax.primitives.convolution.straight_line import as_float32
from cmjax.primitives.convolution.tiles import mix_points, transform_filter, windows
from cmjax.primitives.convolution.toom_cook import ALGORITHMS
from cmjax.primitives.define import count_where

_HEADROOM = 2.0  # of a fine input range over the samples: what it costs is far below the operands


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvScales:
    """Steps of one convolution's quantizers; a pytree whose leaves may be learned.

    Fields:
      input_step: value of one integer of the input, scalar or [cin].
      point_step: how many input integers one operand is worth, per point, [points]; all 1 passes
        transformed integers on as they are (they saturate), powers of two are shifts.
      filter_step: value of one integer of the transformed filter, [points, cout]. With an
        `input_step` per channel, of the filter whose input channels are scaled by
        `input_step / max(input_step)`.
      algorithm: name in `toom_cook.ALGORITHMS`.
      domain: "int8" or "int16".
      input_limit: largest |integer| of the input, R.
    """

    input_step: Float32[Array, "*cin"]
    point_step: Float32[Array, "points"]
    filter_step: Float32[Array, "points cout"]
    algorithm: str = dataclasses.field(metadata={"static": True})
    domain: str = dataclasses.field(metadata={"static": True})
    input_limit: int = dataclasses.field(metadata={"static": True})


def calibrate(
    x: Float[Array, "batch length cin"],
    w: Float[Array, "taps cin cout"],
    *,
    algorithm: str = "auto",
    domain: Literal["int8", "int16"] = "int8",
    stride: int = 1,
    padding: Padding = "SAME",
    dilation: int = 1,
    input_limit: int | None = None,
    requantize: Literal["free", "shift", "none"] = "free",
    method: Literal["mse", "max"] = "mse",
    pair_rule: bool = True,
    min_sqnr_db: float | None = None,
) -> ConvScales:
    """Steps for a convolution of signals like `x` with the filter `w`.

    Args:
      x: samples of the input.
      w: the filter.
      algorithm: a name, or "auto" for `choose_algorithm` under `min_sqnr_db`.
      domain: operands of the products.
      stride, padding, dilation: as in `winograd_conv1d`.
      input_limit: largest integer R of the input. By default it is as fine as the exact transform
        allows (direct convolution: as the operands), so that signals are rounded once, as operands;
        127 is for integer activations; with requantize="none" the default is the largest R that no
        transform carries beyond the operands, and a larger one is range scaling.
      requantize: "free" steps per point; "shift" makes them powers of two; "none" leaves all at 1.
      method: "max" covers the largest magnitude; "mse" takes the fraction of it, 0.35 to 1, of the
        least squared error of the quantized values.
      pair_rule: keep every pair of neighbouring filter rows (positive and negative parts apart)
        within 128, which the fast int8 instructions of AVX2 need for exact sums; kernels take a
        slower path for filters that break it.
    Returns: positive steps; where all samples are zero, 1.
    Raises: ValueError for arguments out of range, TypeError for `x` or `w` not floating point.
    """
    name = "calibrate"
    check_signal_and_filter(name, x, w)
    check_domain(name, domain, ("int8", "int16"))
    check_geometry(name, stride, dilation)
    for argument, value, choices in (
        ("requantize", requantize, ("free", "shift", "none")),
        ("method", method, ("mse", "max")),
    ):
        if value not in choices:
            raise ValueError(f"{name}: {argument} must be one of {choices}, got {value!r}")
    fold = folding(w.shape[0], stride, dilation)
    if algorithm == "auto":
        algorithm = choose_algorithm(
            fold.taps,
            w.shape[1] * fold.frames,
            w.shape[2],
            domain=domain,
            dilation=fold.dilation,
            min_sqnr_db=min_sqnr_db,
        )
    check_algorithm(name, algorithm, fold.taps, fold.dilation)
    if input_limit is None:
        input_limit = _default_input_limit(algorithm, domain, requantize)
        if input_limit == 0:
            raise ValueError(
                f"{name}: {algorithm} enlarges inputs {ALGORITHMS[algorithm].growth} times: none "
                f"is safe in {domain} with requantize='none'; give input_limit, or requantize"
            )
    most = largest_input_limit(algorithm)
    if not 1 <= input_limit <= most:
        raise ValueError(
            f"{name}: input_limit must lie in 1..{most} for {algorithm}, got {input_limit}"
        )
    pads = explicit_padding(name, padding, x.shape[1], w.shape[0], stride, dilation)
    check_length(name, x, pads, fold.extent)
    for argument, values in (("x", x), ("w", w)):
        if bad := count_where(lambda a: ~jnp.isfinite(a), values):
            raise ValueError(f"{name}: {argument} must be finite, {bad} of {values.size} are not")
    return _calibrate(
        x,
        w,
        algorithm=algorithm,
        domain=domain,
        stride=stride,
        padding=pads,
        dilation=dilation,
        input_limit=input_limit,
        requantize=requantize,
        method=method,
        pair_rule=pair_rule,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "algorithm domain stride padding dilation input_limit requantize method pair_rule".split()
    ),
)
def _calibrate(
    x,
    w,
    *,
    algorithm,
    domain,
    stride,
    padding,
    dilation,
    input_limit,
    requantize,
    method,
    pair_rule,
) -> ConvScales:
    form, largest = ALGORITHMS[algorithm], LARGEST_OPERAND[domain]
    fold = folding(w.shape[0], stride, dilation)
    x = x.astype(jnp.float32)
    tried = 27 if method == "mse" else 1
    if input_limit > largest:
        input_step = _covering(jnp.max(jnp.abs(x))) * (_HEADROOM / input_limit)
    else:
        input_step = least_error_step(x, (0, 1, 2), input_limit, tried=tried).reshape(())
    xi, pads = fold_input(x / input_step, padding, fold)
    xi = jnp.clip(jnp.round(xi), -input_limit, input_limit)
    columns, _ = windows(xi, form, taps=fold.taps, dilation=fold.dilation, padding=pads)
    v = jnp.stack(form.bt_program.apply(columns))
    if requantize == "none" or (algorithm == "direct" and input_limit <= largest):
        point_step = jnp.ones((form.n,), jnp.float32)
    else:
        point_step = least_error_step(v, (1, 2, 3), largest, tried=tried).reshape(form.n)
        if requantize == "shift":
            point_step = _nearest_shift(v, point_step, largest)
    u = transformed_filter(fold_filter(w, fold), algorithm)
    most = filter_limit(domain, u.shape[1])
    filter_step = least_error_step(u, (1,), most, tried=tried)[:, 0]
    if pair_rule and domain == "int8":
        blocks = u.reshape(form.n, form.tap_blocks(fold.taps), -1, u.shape[-1])
        filter_step = jnp.maximum(filter_step, _largest_pair(blocks) / most)
    return ConvScales(
        input_step=input_step,
        point_step=point_step,
        filter_step=filter_step,
        algorithm=algorithm,
        domain=domain,
        input_limit=input_limit,
    )


def transformed_filter(
    w: Float[Array, "taps cin cout"], algorithm: str
) -> Float32[Array, "points depth cout"]:
    """G w in float32, rounded alike in whatever program it stands."""
    return _transformed_filter(w.astype(jnp.float32), algorithm)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _transformed_filter(w, algorithm):
    form = ALGORITHMS[algorithm]
    return jnp.stack(transform_filter(w, form, lambda c, v: rounded(as_float32(c) * v)))


@_transformed_filter.defjvp
def _transformed_filter_jvp(algorithm, primals, tangents):
    """The transform is linear, so its derivative is itself, here in one product."""
    (w,), (dw,), form = primals, tangents, ALGORITHMS[algorithm]
    blocks = form.tap_blocks(w.shape[0])
    padded = jnp.pad(dw, ((0, blocks * form.r - w.shape[0]), (0, 0), (0, 0)))
    taps = jnp.moveaxis(padded.reshape(blocks, form.r, *w.shape[1:]), 1, 0)
    tangent = mix_points(form.g, taps).reshape(form.n, -1, w.shape[2])
    return _transformed_filter(w, algorithm), tangent


def least_error_step(
    values: Float[Array, "..."], axes: tuple[int, ...], limit: Any, *, tried: int = 27
) -> Array:
    """The step that represents values best, in squared error, by integers up to `limit`.

    Args:
      values: what is quantized.
      axes: values along these share a step.
      limit: largest integer.
      tried: ranges tried, from 0.35 to 1 of the largest magnitude; 1 covers that magnitude.
    Returns: positive steps, with the axes kept; 1 / limit where all values are zero.
    """
    top = _covering(jnp.max(jnp.abs(values), axis=axes, keepdims=True))
    fractions = jnp.linspace(1.0 if tried == 1 else 0.35, 1.0, tried)
    return _least_error(values, axes, limit, lambda factor: top * factor, fractions / limit)


def check_scales(function: str, scales: ConvScales) -> None:
    """Refuse what is no scales, and scales that are known to be no positive numbers."""
    if not isinstance(scales, ConvScales):
        raise TypeError(f"{function}: scales must be ConvScales, as of calibrate, got {scales!r}")
    for field in ("input_step", "point_step", "filter_step"):
        check_steps(function, f"scales.{field}", getattr(scales, field))


def check_scales_fit(function: str, scales: ConvScales, cin: int, cout: int) -> None:
    """Refuse scales whose shapes are not those of a filter."""
    points = ALGORITHMS[scales.algorithm].n
    shapes = {
        "input_step": ((), (cin,)),
        "point_step": ((points,),),
        "filter_step": ((points, cout),),
    }
    for field, allowed in shapes.items():
        shape = jnp.shape(getattr(scales, field))
        if shape not in allowed:
            raise ValueError(
                f"{function}: scales.{field} must have shape {' or '.join(map(str, allowed))} for "
                f"{scales.algorithm} with {cin} input and {cout} output channels, got {shape}"
            )


def _default_input_limit(algorithm: str, domain: str, requantize: str) -> int:
    if algorithm == "direct":
        return LARGEST_OPERAND[domain]
    if requantize == "none":
        return ALGORITHMS[algorithm].safe_range(LARGEST_OPERAND[domain])
    return largest_input_limit(algorithm)


def _covering(top: Array) -> Array:
    """A largest magnitude, made usable as a range where it is zero."""
    return jnp.where(top > 0, top, 1.0)


def _least_error(values, axes, limit, step_of, candidates) -> Array:
    def error(candidate):
        step = step_of(candidate)
        off = jnp.clip(jnp.round(values / step), -limit, limit) * step - values
        return jnp.mean(off * off, axis=axes, keepdims=True)

    best = jnp.argmin(lax.map(error, candidates), axis=0)
    return step_of(candidates[best])


def _nearest_shift(v: Array, step: Array, limit: int) -> Array:
    """Per point, the power of two around `step`, at least 1, of the least squared error."""
    exponent = jnp.ceil(jnp.log2(step))[:, None, None, None]
    candidates = jnp.array([-1.0, 0.0, 1.0])

    def power(more):
        return jnp.exp2(jnp.maximum(exponent + more, 0.0))

    return _least_error(v, (1, 2, 3), limit, power, candidates).reshape(-1)


def _largest_pair(u: Float[Array, "points blocks cin cout"]) -> Array:
    """Largest sum of the positive, or of the negative, parts of two neighbouring rows."""
    u = jnp.pad(u, ((0, 0), (0, 0), (0, u.shape[2] % 2), (0, 0)))
    pairs = u.reshape(*u.shape[:2], -1, 2, u.shape[-1])
    sums = jnp.maximum(jnp.maximum(pairs, 0).sum(3), jnp.maximum(-pairs, 0).sum(3))
    return jnp.max(sums, axis=(1, 2))
