"""NaN and infinities in integer convolutions: NaN where they reach, and nowhere else a trace."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from cmjax import native
from cmjax.primitives.convolution import (
    calibrate,
    fsmn_memory,
    prepack,
    rsq_quantize,
    winograd_conv1d,
)

needs_kernels = pytest.mark.skipif(not native.status().enabled, reason=native.status().reason)

# algorithm, domain, taps, stride, dilation, padding
CASES = [
    ("direct", "int8", 3, 1, 1, "SAME"),
    ("direct", "int8", 3, 2, 1, "SAME"),
    ("direct", "int16", 5, 3, 1, (3, 1)),
    ("direct", "int8", 3, 1, 4, "SAME"),
    ("direct", "int8", 3, 2, 2, "VALID"),
    ("direct", "int8", 4, 3, 2, (2, 5)),
    ("direct", "int8", 4, 1, 1, (-3, 2)),
    ("F(4,3)", "int8", 3, 1, 1, "SAME"),
    ("F(2,3)", "int16", 5, 2, 1, "SAME"),
    ("F(4,4)", "int8", 11, 1, 1, "SAME"),
    ("N88", "int8", 7, 1, 1, "SAME_LOWER"),
]


def arrays(taps, groups=1, length=41, cin=8, cout=4):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, length, cin)).astype(np.float32)
    return x, rng.normal(size=(taps, cin // groups, cout)).astype(np.float32)


def broken(x):
    """A NaN, two infinities, and a row without either."""
    x = x.copy()
    x[0, 7, 3], x[1, 20, -1], x[1, 0, 0] = np.nan, np.inf, -np.inf
    return x


def xlas(x, w, case, groups=1):
    _, _, _, stride, dilation, padding = case
    padding = padding if isinstance(padding, str) else [padding]
    return np.asarray(
        lax.conv_general_dilated(
            x,
            w,
            (stride,),
            padding,
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )
    )


def convolution(case, w, *, fixed, groups=1, **options):
    algorithm, domain, _, stride, dilation, padding = case
    shape = {"stride": stride, "dilation": dilation, "groups": groups}
    kind = {"algorithm": algorithm, "domain": domain}
    scales = None
    if fixed:
        x, _ = arrays(w.shape[0], groups)
        scales = calibrate(x, w, padding=padding, **shape, **kind)

    def fn(x, w=w):
        return winograd_conv1d(x, w, padding=padding, scales=scales, **shape, **kind, **options)

    return fn


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_nan_is_where_it_reaches_and_all_else_is_as_with_zeros_there(case, fixed, groups):
    x, w = arrays(case[2], groups)
    fn, wrong = convolution(case, w, fixed=fixed, groups=groups), broken(x)
    eager, jitted = np.asarray(fn(wrong)), np.asarray(jax.jit(fn)(wrong))
    np.testing.assert_array_equal(eager, jitted)
    reached = ~np.isfinite(xlas(wrong, w, case, groups))
    np.testing.assert_array_equal(np.isnan(eager), reached)
    clean = np.asarray(fn(np.where(np.isfinite(wrong), wrong, 0)))
    np.testing.assert_array_equal(eager[~reached], clean[~reached])
    assert np.abs(clean - xlas(np.where(np.isfinite(wrong), wrong, 0), w, case, groups)).max() < 2


def report() -> None:
    """Print the bits of every case as this process computes them."""
    for case in CASES:
        for groups in (1, 2):
            x, w = arrays(case[2], groups, length=300, cin=64, cout=32)
            y = jax.jit(convolution(case, w, fixed=False, groups=groups))(broken(x))
            y = np.where(np.isnan(y), np.float32(7e7), y)
            print(case, groups, hash(y.tobytes()), float(y.sum()))


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("isa", ["", "avx2", "scalar"])
def test_xla_and_the_kernels_of_every_instruction_set_agree_on_them(isa):
    def run(**environment):
        return subprocess.run(
            [sys.executable, __file__],
            env=os.environ
            | {"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONHASHSEED": "0"}
            | environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    with_kernels = run(**({"CMJAX_NATIVE_ISA": isa} if isa else {}))
    assert with_kernels.count("\n") == 2 * len(CASES)
    assert with_kernels == run(CMJAX_NATIVE="off")


@pytest.mark.parametrize("packed", [False, True])
def test_an_output_channel_whose_filter_is_not_finite_is_nan_and_spares_the_others(packed):
    case = CASES[7]
    x, w = arrays(3)
    fn = convolution(case, w, fixed=True)
    y = fn(x)
    wrong = w.copy()
    wrong[1, 2, 3] = np.inf
    got = fn(x, wrong)
    if packed:
        scales = calibrate(x, w, algorithm=case[0])
        got = winograd_conv1d(x, prepack(wrong, scales))
    np.testing.assert_array_equal(np.isnan(got[..., 3]), True)
    np.testing.assert_array_equal(got[..., :3], y[..., :3])
    dynamic = jax.jit(convolution(case, w, fixed=False))(x, wrong)
    np.testing.assert_array_equal(np.isnan(dynamic).all((0, 1)), [False, False, False, True])
    np.testing.assert_array_equal(np.isnan(dynamic).any((0, 1)), [False, False, False, True])


def test_the_frames_outside_a_valid_range_are_zero_though_the_signal_is_nan_there():
    case = CASES[7]
    x, w = arrays(3)
    wrong, valid = x.copy(), jnp.array([[0, 20], [5, 41], [0, 0]], jnp.int32)
    for row, (start, stop) in enumerate(valid):
        wrong[row, :start], wrong[row, stop + 1 :] = np.nan, np.nan
    y = convolution(case, w, fixed=True, valid_range=valid)(wrong)
    assert not np.isnan(y[0]).any() and not np.isnan(y[2]).any()
    np.testing.assert_array_equal(y[2], 0)
    np.testing.assert_array_equal(y[1, :5], 0)


def test_they_travel_through_export_with_a_symbolic_batch_and_length():
    case = CASES[8]
    x, w = arrays(5)
    fn = jax.jit(convolution(case, w, fixed=True))
    shape = export.symbolic_shape("b, t", constraints=["t >= 16"])
    exported = export.export(fn)(jax.ShapeDtypeStruct((*shape, 8), jnp.float32))
    np.testing.assert_array_equal(exported.call(broken(x)), fn(broken(x)))


def test_a_mapped_row_of_nan_spares_the_others_and_their_gradient():
    case = CASES[7]
    x, w = arrays(3)
    fn = convolution(case, w, fixed=True)
    rows = np.stack([x, broken(x), x])
    each = jax.jit(jax.vmap(fn))(rows)
    np.testing.assert_array_equal(each[0], fn(x))
    np.testing.assert_array_equal(each[1], fn(broken(x)))
    gradient = jax.grad(lambda x: jnp.nansum(fn(x)))(broken(x))
    np.testing.assert_array_equal(gradient[2], jax.grad(lambda x: fn(x).sum())(x)[2])
    assert np.isfinite(gradient[2]).all()


def test_a_fake_quantizer_keeps_nan_and_saturates_infinities():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.3])
    for fn in (rsq_quantize, jax.jit(rsq_quantize, static_argnames="limit")):
        np.testing.assert_array_equal(fn(x, 0.5, limit=4), np.float32([np.nan, 2, -2, 0.5]))


def test_a_memory_keeps_them_where_they_reach_with_kernels_and_without():
    x = broken(np.random.default_rng(0).normal(size=(3, 41, 8)).astype(np.float32))
    past, future = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    span = jnp.array([[0, 41]] * 3, jnp.int32)
    fn = jax.jit(lambda x: fsmn_memory(x, x, past, future, span))
    y = np.asarray(fn(x))
    np.testing.assert_array_equal(export.export(fn)(x).call(x), y)
    reached = np.zeros(y.shape, bool)
    reached[0, 4:10, 3] = reached[1, 17:23, -1] = reached[1, :3, 0] = True
    np.testing.assert_array_equal(~np.isfinite(y), reached)


if __name__ == "__main__":
    report()
