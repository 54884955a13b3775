"""Ways to quantize a Winograd convolution, each run by the library's own integer convolution.

P0 direct int8; P1 integers transformed and quantized again with one step per tensor; P2 one step
per tensor, in the transformed domain only; P3 steps per point for signals, per point and output
channel for filters (what MNN's engine stores); P3b per point for both; P4 as P3 with powers of two;
P5 int8 signals, transformed exactly, one new step per point; P6 int8 signals so small that no
transform overflows; P7 as P6 with a larger, saturating range, the best one; P8 exact integers with
int16 operands; P9 as P5 with shifts.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.primitives.convolution import (
    ALGORITHMS,
    ConvScales,
    calibrate,
    least_error_step,
    prepack,
    rsq_quantize,
    winograd_conv1d,
)
from cmjax.primitives.convolution.quantized import quantized_conv
from cmjax.primitives.convolution.tiles import transform_filter_rounded

PIPELINES = ("P0", "P1", "P2", "P3b", "P3", "P4", "P5", "P9", "P6", "P7", "P8")
SIGNALS = ("Gaussian", "speech-like")

_RANGES_TRIED = (1.0, 1.2, 1.4, 1.6, 1.9, 2.3)  # of the safe one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the convolution that is measured."""

    cin: int = 256
    cout: int = 64
    length: int = 1030


def signal(kind: str, sizes: Sizes, *, seed: int = 0, batch: int = 1) -> jax.Array:
    """White Gaussian, or rectified first-order autoregressions with log-normal channel gains.

    Another seed is another sample of the same channels.
    """
    rng, channels = np.random.default_rng(seed), np.random.default_rng(3)
    x = rng.normal(size=(batch, sizes.length, sizes.cin))
    if kind == "speech-like":
        memory = channels.uniform(0.5, 0.95, sizes.cin)
        for t in range(1, sizes.length):
            x[:, t] = memory * x[:, t - 1] + np.sqrt(1 - memory**2) * x[:, t]
        x = np.maximum(x, 0) * channels.lognormal(0, 0.5, sizes.cin)
    return jnp.asarray(x, jnp.float32)


def random_filter(taps: int, sizes: Sizes) -> jax.Array:
    """Gaussian taps of unit output power, with log-normal gains per output channel."""
    rng = np.random.default_rng([0, 7])
    w = rng.normal(size=(taps, sizes.cin, sizes.cout)) / math.sqrt(taps * sizes.cin)
    return jnp.asarray(w * rng.lognormal(0, 0.4, sizes.cout), jnp.float32)


def exact(x: jax.Array, w: jax.Array) -> np.ndarray:
    """The convolution in float64."""
    taps, filters = len(w), np.asarray(w, np.float64)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), ((taps - 1) // 2, taps // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps, axis=1)
    return np.einsum("btcj,jco->bto", windows, filters, optimize=True)


def sqnr_db(want: np.ndarray, got) -> float:
    """Signal over noise of the output, in dB."""
    noise = np.asarray(got, np.float64) - want
    return float(10 * np.log10((want**2).sum() / (noise**2).sum()))


def pipeline_sqnr_db(pipeline: str, algorithm: str, x: jax.Array, w: jax.Array) -> float | None:
    """What a pipeline reaches on a signal.

    None where it cannot be: P6 and P7 if even inputs of +-1 overflow, P8 if integers outgrow int16.
    """
    want = exact(x, w)
    if pipeline in ("P6", "P7") and ALGORITHMS[algorithm].safe_range() == 0:
        return None
    if pipeline == "P0":
        return sqnr_db(want, _run(x, w, _calibrated(x, w, "direct")))
    if pipeline == "P7":
        safe = ALGORITHMS[algorithm].safe_range()
        ranges = sorted({min(127, round(safe * factor)) for factor in _RANGES_TRIED})
        return max(sqnr_db(want, _run(x, w, _ranged(x, w, algorithm, r))) for r in ranges)
    if pipeline == "P8":
        got = _exact_integers(algorithm, x, w)
        return None if got is None else sqnr_db(want, got)
    if pipeline == "P1":  # a filter that is int8 before its transform
        step = least_error_step(w, (0, 1, 2), 127)
        return sqnr_db(
            want, _run(x, rsq_quantize(w, step, limit=127), _scales("P1", algorithm, x, w))
        )
    return sqnr_db(want, _run(x, w, _scales(pipeline, algorithm, x, w)))


def _run(x, w, scales: ConvScales):
    return winograd_conv1d(x, prepack(w, scales))


def _calibrated(x, w, algorithm, **options) -> ConvScales:
    return calibrate(x, w, algorithm=algorithm, pair_rule=False, **options)


def _scales(pipeline: str, algorithm: str, x, w) -> ConvScales:
    """P3's scales changed into those of another pipeline."""
    if pipeline in ("P5", "P9", "P1"):
        requantize = "shift" if pipeline == "P9" else "free"
        scales = _calibrated(x, w, algorithm, input_limit=127, requantize=requantize)
    elif pipeline == "P6":
        return _ranged(x, w, algorithm, ALGORITHMS[algorithm].safe_range())
    else:
        scales = _calibrated(x, w, algorithm)
    u = transform_filter_rounded(w, algorithm)
    if pipeline in ("P1", "P2"):
        v = _transformed(x / scales.input_step, algorithm)
        return dataclasses.replace(
            scales,
            point_step=jnp.full_like(
                scales.point_step, least_error_step(v, (0, 1, 2, 3), 127).item()
            ),
            filter_step=jnp.full_like(
                scales.filter_step, least_error_step(u, (0, 1, 2), 127).item()
            ),
        )
    if pipeline == "P3b":
        per_point = least_error_step(u, (1, 2), 127)[:, :, 0]
        return dataclasses.replace(
            scales, filter_step=jnp.broadcast_to(per_point, scales.filter_step.shape)
        )
    if pipeline == "P4":
        return jax.tree.map(lambda step: jnp.exp2(jnp.ceil(jnp.log2(step))), scales)
    return scales


def _ranged(x, w, algorithm: str, limit: int) -> ConvScales:
    """Signals of integers up to `limit`, their transforms passed on as they are."""
    scales = _calibrated(x, w, algorithm, requantize="none")
    step = least_error_step(x, (0, 1, 2), limit).reshape(())
    return dataclasses.replace(scales, input_step=step, input_limit=limit)


@functools.partial(jax.jit, static_argnames="algorithm")
def _transformed(x, algorithm: str):
    """B^T x of every tile that lies inside x, [points, batch, tiles, cin]."""
    form = ALGORITHMS[algorithm]
    last = (x.shape[1] - form.window) // form.m * form.m
    columns = [lax.slice_in_dim(x, j, j + last + 1, form.m, axis=1) for j in range(form.window)]
    return jnp.stack(form.bt_program.apply(columns))


def _exact_integers(algorithm: str, x, w):
    """int8 signals and filters, an integer multiple of G, int16 operands: nothing is rounded."""
    form = ALGORITHMS[algorithm]
    factor = math.lcm(*(c.denominator for row in form.g for c in row))
    g = np.array([[int(factor * c) for c in row] for row in form.g])
    largest = 127 * form.growth * 127 * int(np.abs(g).sum(1).max()) * x.shape[2]
    if 127 * form.growth > 2047 or largest >= 2**31 or 127 * np.abs(g).sum(1).max() >= 2**15:
        return None
    input_step = least_error_step(x, (0, 1, 2), 127).reshape(())
    filter_step = least_error_step(w, (0, 1), 127)
    integers = np.clip(np.round(np.asarray(w / filter_step)), -127, 127).astype(np.int64)
    u = np.einsum("pj,jco->pco", g, integers)
    taps = len(w)
    return quantized_conv(
        x,
        jnp.asarray(u, jnp.int16),
        input_step=input_step,
        point_step=jnp.ones(form.n),
        filter_step=jnp.broadcast_to(filter_step[0] / factor, (form.n, w.shape[2])),
        bias=jnp.zeros(w.shape[2]),
        algorithm=algorithm,
        taps=taps,
        dilation=1,
        padding=((taps - 1) // 2, taps // 2),
        input_limit=127,
        operand_limit=2047,
        slope=1.0,
        packed=False,
    )
