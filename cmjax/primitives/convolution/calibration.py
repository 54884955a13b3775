"""Steps of a convolution's quantizers found from samples: `calibrate`.

    x ~ input_step * xi,   B^T xi ~ point_step * v,   G w ~ filter_step * u

Each covers the largest magnitude of what it quantizes, or the fraction of it that gives the least
squared error.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from cmjax.primitives.convolution.geometry import Padding, fold_filter, fold_input, folding
from cmjax.primitives.convolution.nonfinite import without_nonfinite
from cmjax.primitives.convolution.plan import INTEGER_DOMAINS, ConvPlan, plan_conv
from cmjax.primitives.convolution.ranges import (
    LARGEST_OPERAND,
    filter_limit,
    input_range,
    largest_input_limit,
    largest_operand,
)
from cmjax.primitives.convolution.scales import ConvScales
from cmjax.primitives.convolution.tiles import transform_filter_rounded, windows
from cmjax.primitives.convolution.toom_cook import ALGORITHMS
from cmjax.primitives.define import count_where

_HEADROOM = 2.0  # of a fine input range over the samples: what it costs is far below the operands


def calibrate(
    x: Float[Array, "batch length cin"],
    w: Float[Array, "taps of_group cout"],
    *,
    algorithm: str = "auto",
    domain: Literal["int8", "int16"] = "int8",
    stride: int = 1,
    padding: Padding = "SAME",
    dilation: int = 1,
    groups: int = 1,
    input_limit: int | None = None,
    zero_point: int | Literal["auto"] = 0,
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
      stride, padding, dilation, groups: as in `winograd_conv1d`.
      input_limit: largest integer R of the input. By default it is as fine as the exact transform
        allows (direct convolution: as the operands), so that signals are rounded once, as operands;
        127 is for integer activations; with requantize="none" the default is the largest R that no
        transform carries beyond the operands, and a larger one is range scaling.
      zero_point: the integer that stands for 0; -R-1 spends all of the range on inputs that are
        never negative. "auto" takes it from the least and largest sample, which must be known.
        Not 0, R is that of the operands unless given.
      requantize: "free" steps per point; "shift" makes them powers of two; "none" leaves all at 1.
      method: "max" covers the largest magnitude; "mse" takes the fraction of it, 0.35 to 1, of the
        least squared error of the quantized values.
      pair_rule: keep every pair of neighbouring filter rows (positive and negative parts apart)
        within 128, which the fast int8 instructions of AVX2 need for exact sums; kernels take a
        slower path for filters that break it.
    Returns: positive steps; where all samples are zero, 1.
    Raises: ValueError for arguments out of range, TypeError for `x` or `w` not floating point.
    Example:

      >>> x = jnp.sin(jnp.arange(64.0)).reshape(1, 16, 4)
      >>> scales = calibrate(x, jnp.ones((3, 4, 8)), algorithm="F(2,3)")
      >>> scales.input_step.shape, scales.point_step.shape, scales.filter_step.shape
      ((), (4,), (4, 8))
    """
    name = "calibrate"
    plan = plan_conv(
        name,
        x,
        w,
        algorithm=algorithm,
        domain=domain,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        min_sqnr_db=min_sqnr_db,
        domains=INTEGER_DOMAINS,
    )
    for argument, value, choices in (
        ("requantize", requantize, ("free", "shift", "none")),
        ("method", method, ("mse", "max")),
    ):
        if value not in choices:
            raise ValueError(f"{name}: {argument} must be one of {choices}, got {value!r}")
    form, most = plan.filter.form, largest_input_limit(plan.filter.algorithm)
    if input_limit is None:
        input_limit = _default_input_limit(plan, requantize, zero_point != 0)
        if input_limit == 0:
            raise ValueError(
                f"{name}: {form.name} enlarges inputs {form.growth} times: none is safe in "
                f"{domain} with requantize='none'; give input_limit, or requantize"
            )
    if not 1 <= input_limit <= most:
        raise ValueError(
            f"{name}: input_limit must lie in 1..{most} for {form.name}, got {input_limit}"
        )
    _check_finite(name, x, w)
    if zero_point == "auto":
        zero_point = _covering_zero_point(name, x, input_limit)
    input_range(input_limit, zero_point)  # refuses a zero point that is out of range
    return _calibrate(
        x,
        w,
        plan=plan,
        input_limit=input_limit,
        zero_point=zero_point,
        requantize=requantize,
        method=method,
        pair_rule=pair_rule,
    )


def dynamic_scales(x: Array, w: Array, plan: ConvPlan) -> ConvScales:
    """Steps from the largest magnitudes of one call's own operands; constants to derivatives.

    Args:
      x, w: signal and filter of the call. Of x what is not finite does not count; an output channel
        of w that is not finite throughout gets NaN.
      plan: of the call.
    """
    limit = _default_input_limit(plan, "free")
    options = {
        "input_limit": limit,
        "zero_point": 0,
        "requantize": "free",
        "method": "max",
        "pair_rule": True,
    }
    return lax.stop_gradient(_calibrate(x, w, plan=plan, **options))


def saturation(
    x: Float[Array, "batch length cin"],
    scales: ConvScales,
    *,
    taps: int,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> tuple[Float[Array, ""], int]:
    """By how much transformed inputs leave the range of operands, and how many there are.

        sum of max(|B^T (x / input_step) / point_step| / V - 1, 0),   V the largest operand

    Args:
      x: signal.
      scales: whose algorithm, steps and domain are meant.
      taps, stride, padding: of the convolution, whose filter is not dilated.
    Returns: the sum, in units of the range, and the number of transformed values.
    """
    form, fold = ALGORITHMS[scales.algorithm], folding(taps, stride, 1)
    folded, pads = fold_input(x / scales.input_step, padding, fold)
    columns, _ = windows(folded, form, taps=fold.taps, dilation=fold.dilation, padding=pads)
    points = jnp.stack(form.bt_program.apply(columns))
    v = points / scales.point_step[:, None, None, None]
    excess = jnp.abs(v) / LARGEST_OPERAND[scales.domain] - 1
    return jnp.maximum(excess, 0).sum(), v.size


@functools.partial(
    jax.jit,
    static_argnames=("plan", "input_limit", "zero_point", "requantize", "method", "pair_rule"),
)
def _calibrate(
    x, w, *, plan: ConvPlan, input_limit, zero_point, requantize, method, pair_rule
) -> ConvScales:
    algorithm, domain, fold = plan.filter.algorithm, plan.filter.domain, plan.filter.fold
    form, largest = plan.filter.form, LARGEST_OPERAND[domain]
    x, w = without_nonfinite(x.astype(jnp.float32)), w.astype(jnp.float32)
    tried, span = 27 if method == "mse" else 1, input_range(input_limit, zero_point)
    if input_limit > largest and not zero_point:
        input_step = _covering(_largest(x)) * (_HEADROOM / input_limit)
    else:
        input_step = least_error_step(x, (0, 1, 2), span, tried=tried).reshape(())
    xi, pads = fold_input(x / input_step, plan.padding, fold)
    xi = jnp.clip(jnp.round(xi), *span)
    columns, _ = windows(xi, form, taps=fold.taps, dilation=fold.dilation, padding=pads)
    v = jnp.stack(form.bt_program.apply(columns))
    if requantize == "none" or (algorithm == "direct" and input_limit <= largest):
        point_step = jnp.ones((form.n,), jnp.float32)
    else:
        point_step = least_error_step(v, (1, 2, 3), largest, tried=tried).reshape(form.n)
        if requantize == "shift":
            point_step = _nearest_shift(v, point_step, largest)
    u = transform_filter_rounded(fold_filter(w, fold), algorithm)
    operand = largest_operand(algorithm, input_limit, largest, zero_point)
    most = filter_limit(domain, u.shape[1], operand=operand)
    filter_step = least_error_step(u, (1,), most, tried=tried)[:, 0]
    if pair_rule and domain == "int8":
        blocks = u.reshape(form.n, plan.filter.tap_blocks, -1, u.shape[-1])
        filter_step = jnp.maximum(filter_step, _largest_pair(blocks) / most)
    return ConvScales(
        input_step=input_step,
        point_step=point_step,
        filter_step=filter_step,
        algorithm=algorithm,
        domain=domain,
        input_limit=input_limit,
        zero_point=zero_point,
    )


def least_error_step(
    values: Float[Array, "..."],
    axes: tuple[int, ...],
    limit: int | tuple[int, int],
    *,
    tried: int = 27,
) -> Array:
    """The step that represents values best, in squared error, by integers up to `limit`.

    Args:
      values: what is quantized.
      axes: values along these share a step.
      limit: largest integer, or (low, high) around zero.
      tried: ranges tried, from 0.35 to 1 of the largest magnitude; 1 covers that magnitude.
    Returns: positive steps, with the axes kept; 1 / limit where all values are zero.
    Example: a lone outlier is not worth a coarse step for all others.

      >>> values = jnp.append(jnp.linspace(-1, 1, 1000), 2.0)[None]
      >>> covering = least_error_step(values, (1,), 7, tried=1)
      >>> round(float(covering[0, 0]), 4), bool(least_error_step(values, (1,), 7) < covering)
      (0.2857, True)
    """
    low, high = limit if isinstance(limit, tuple) else (-limit, limit)
    fractions = jnp.linspace(1.0 if tried == 1 else 0.35, 1.0, tried, dtype=jnp.float32)
    if -low == high:
        top = _covering(_largest(values, axes))
        return _least_error(values, axes, low, high, lambda f: top * f, fractions / high)
    above = jnp.max(values, axis=axes, keepdims=True, initial=0) / high if high else 0.0
    below = jnp.min(values, axis=axes, keepdims=True, initial=0) / low if low else 0.0
    step = jnp.maximum(above, below)
    step = jnp.where(step > 0, step, 1 / max(high, -low)).astype(values.dtype)
    return _least_error(values, axes, low, high, lambda f: step * f, fractions)


def _check_finite(function: str, x: Array, w: Array) -> None:
    for argument, values in (("x", x), ("w", w)):
        if bad := count_where(lambda a: ~jnp.isfinite(a), values):
            raise ValueError(
                f"{function}: {argument} must be finite, {bad} of {values.size} are not"
            )


def _covering_zero_point(function: str, x: Array, input_limit: int) -> int:
    """The integer for 0 of the finest step at which two's complement integers cover the samples."""
    if isinstance(x, Tracer):
        raise ValueError(f"{function}: zero_point='auto' needs samples that are known, not traced")
    least, most = min(float(jnp.min(x, initial=0)), 0.0), max(float(jnp.max(x, initial=0)), 0.0)
    if least == most:
        return 0
    step = (most - least) / (2 * input_limit + 1)
    found = round(-input_limit - 1 - least / step)
    return min(max(found, -input_limit - 1), input_limit)


def _largest(values: Array, axes: tuple[int, ...] | None = None) -> Array:
    """The largest magnitude; 0 of none."""
    return jnp.max(jnp.abs(values), axis=axes, keepdims=axes is not None, initial=0)


def _default_input_limit(plan: ConvPlan, requantize: str, asymmetric: bool = False) -> int:
    algorithm, largest = plan.filter.algorithm, LARGEST_OPERAND[plan.filter.domain]
    if algorithm == "direct":
        return largest
    if asymmetric:
        return min(largest, largest_input_limit(algorithm))
    if requantize == "none":
        return plan.filter.form.safe_range(largest)
    return largest_input_limit(algorithm)


def _covering(top: Array) -> Array:
    """A largest magnitude, made usable as a range where it is zero."""
    return jnp.where(top > 0, top, 1.0)


def _least_error(values, axes, low, high, step_of, candidates) -> Array:
    def error(candidate):
        step = step_of(candidate)
        off = jnp.clip(jnp.round(values / step), low, high) * step - values
        return jnp.mean(off * off, axis=axes, keepdims=True)

    best = jnp.argmin(lax.map(error, candidates), axis=0)
    return step_of(candidates[best])


def _nearest_shift(v: Array, step: Array, limit: int) -> Array:
    """Per point, the power of two around `step`, at least 1, of the least squared error."""
    exponent = jnp.ceil(jnp.log2(step))[:, None, None, None]
    candidates = jnp.array([-1.0, 0.0, 1.0], v.dtype)

    def power(more):
        return jnp.exp2(jnp.maximum(exponent + more, 0.0))

    return _least_error(v, (1, 2, 3), -limit, limit, power, candidates).reshape(-1)


def _largest_pair(u: Float[Array, "points blocks cin cout"]) -> Array:
    """Largest sum of the positive, or of the negative, parts of two neighbouring rows."""
    u = jnp.pad(u, ((0, 0), (0, 0), (0, u.shape[2] % 2), (0, 0)))
    pairs = u.reshape(*u.shape[:2], -1, 2, u.shape[-1])
    sums = jnp.maximum(jnp.maximum(pairs, 0).sum(3), jnp.maximum(-pairs, 0).sum(3))
    return jnp.max(sums, axis=(1, 2))
