"""The decomposition against its bounds, in float64 NumPy, over rows meant to break it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export

from cmjax.primitives.msd.decompose import STEP, msd_decompose
from cmjax.program import trace

F32 = jnp.float32

RNG = np.random.default_rng(0)
E2M1_HALF_STEPS = {0, 1, 2, 3, 4, 6, 8, 12}


def _rows(kind, length=256):
    rng = np.random.default_rng(len(kind))
    x = rng.normal(size=(16, length))
    match kind:
        case "normal":
            pass
        case "student t(2)":
            x = rng.standard_t(2, size=x.shape)
        case "outliers":
            x *= np.where(rng.random(x.shape) < 1e-3, 1000, 1)
        case "uniform":
            x = rng.uniform(-1, 1, size=x.shape)
        case "bfloat16 grid":
            x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
        case "tie grid":  # every value lies between two steps of the second part
            x = rng.integers(-64516, 64517, size=x.shape) / 64516
            x[:, 0] = 1
        case "one outlier":
            x *= 1e-6
            x[:, 7] = 3
        case "all equal":
            x = np.full(x.shape, -0.37)
        case "smallest and largest":
            x *= np.logspace(-30, 37, 16)[:, None]
    return x.astype(np.float32)


KINDS = (
    "normal|student t(2)|outliers|uniform|bfloat16 grid|tie grid|one outlier|all equal|"
    "smallest and largest"
).split("|")


def _value(x, **how):
    """What the parts stand for, in float64; the parts; the scale."""
    parts, scale = msd_decompose(x, **how)
    step = STEP[how.get("format", "int8")]
    steps = sum(np.asarray(p, np.float64) / step**i for i, p in enumerate(parts))
    wide = np.repeat(np.asarray(scale, np.float64), x.shape[-1] // scale.shape[-1], axis=-1)
    return wide * steps, np.asarray(parts), np.asarray(scale)


def _int8_bound(x, passes):
    return np.abs(x).max(-1, keepdims=True).astype(np.float64) / (254 * 254.0 ** (passes - 1))


def _alpha(x):
    blocks = np.abs(x.astype(np.float64)).reshape(*x.shape[:-1], -1, 32).max(-1)
    alpha = 2.0 ** np.ceil(np.log2(np.maximum(blocks, 1e-300)))
    return np.repeat(alpha, 32, axis=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["away", "even"])
@pytest.mark.parametrize("passes, slack", [(1, 1.0001), (2, 1.01), (3, 3.0)])
def test_int8_error_is_within_the_bound(kind, rounding, passes, slack):
    """Three parts exhaust float32: then u, rounded to 24 bits, limits the error."""
    x = _rows(kind)
    value, parts, _ = _value(x, passes=passes, rounding=rounding)
    assert np.abs(parts.astype(int)).max() <= 127
    assert (np.abs(value - x) <= slack * _int8_bound(x, passes)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["away", "even"])
@pytest.mark.parametrize("passes, steps", [(1, 8), (2, 64)])
def test_mxfp4_error_is_within_the_bound_and_nothing_saturates(kind, rounding, passes, steps):
    x = _rows(kind)
    value, parts, _ = _value(x, format="mxfp4", passes=passes, rounding=rounding)
    assert set(np.abs(parts.astype(int)).ravel()) <= E2M1_HALF_STEPS - {12}
    assert (np.abs(value - x) <= (1 + 1e-6) * _alpha(x) / steps).all()


floats = st.one_of(
    st.floats(-(2.0**127), 2.0**127, width=32),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 3.4e38, 1.0, -127.0, 0.5 / 127]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(floats, min_size=32, max_size=32), st.sampled_from(["away", "even"]))
@example([0.0] * 32, "away")
@example([1e-45] * 32, "away")
@example([3.4028234e38] * 31 + [-3.4028234e38], "even")
@example([2.0**-100] + [2.0**-101] * 31, "away")
def test_bounds_hold_for_any_row_of_finite_numbers(row, rounding):
    """Rows whose maximum is under 2**-100 count as zero: the error is the row itself."""
    x = np.array([row], np.float32)
    for how, bound in (
        ({"format": "int8"}, 1.01 * _int8_bound(x, 2)),
        ({"format": "mxfp4"}, (1 + 1e-6) * _alpha(x) / 64),
    ):
        value, _, scale = _value(x, rounding=rounding, **how)
        assert np.isfinite(scale).all()
        assert (np.abs(value - x) <= np.maximum(bound, 2.0**-100)).all()


def test_parts_are_the_vendors_with_ties_away_from_zero():
    """u = 127 x / M in float32, a1 = round(u), a2 = round(254 (u - a1)): equal bits in NumPy."""
    x = np.concatenate([_rows(kind) for kind in KINDS])
    x = np.concatenate([x, -x])
    parts, scale = msd_decompose(x)
    top = np.abs(x).max(-1, keepdims=True)
    u = x * (np.float32(127) / top)

    def away(v):
        whole = np.trunc(v)
        return whole + np.copysign(np.abs(v - whole) >= 0.5, v)

    a1 = away(u)
    a2 = away(np.float32(254) * (u - a1))
    np.testing.assert_array_equal(parts[0], a1)
    np.testing.assert_array_equal(parts[1], a2)
    np.testing.assert_allclose(scale, top / 127, rtol=2e-7)


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
@pytest.mark.parametrize("rounding", ["away", "even"])
def test_signs_are_symmetric_zero_rows_are_zero_and_maxima_are_exact(format, rounding):
    how = {"format": format, "rounding": rounding}
    x = _rows("normal", 64)
    value, parts, _ = _value(x, **how)
    opposite, mirrored, _ = _value(-x, **how)
    np.testing.assert_array_equal(mirrored, -parts)
    np.testing.assert_array_equal(opposite, -value)
    zero, parts, scale = _value(np.zeros((2, 64), np.float32), **how)
    assert not zero.any() and not parts.any() and not scale.any()
    if format == "int8":
        top = np.abs(x) == np.abs(x).max(-1, keepdims=True)
        _, parts, _ = _value(x, **how)
        np.testing.assert_array_equal(np.abs(parts[0].astype(int))[top], 127)
        np.testing.assert_array_equal(parts[1][top], 0)


def test_effective_bits_are_the_published_ones():
    """log2(2 M / (sqrt(12) rms)): 15.98 for two int8 parts, 6.6 for two mxfp4 parts (about 16 and
    about 6.6 in the abstract of arXiv 2605.13915)."""
    x = RNG.uniform(-1, 1, size=(64, 4096)).astype(np.float32)
    error = _value(x)[0] - x
    bits = np.log2(2 * np.abs(x).max() / (np.sqrt(12) * np.sqrt((error**2).mean())))
    assert abs(bits - 15.98) < 0.02
    x[:, ::32] = 1  # alpha is the block's largest value
    error = _value(x, format="mxfp4")[0] - x
    bits = -np.log2(np.sqrt((error**2).sum() / (x**2).sum()))
    assert 6.60 < bits < 6.67
    gaussian = RNG.normal(size=(64, 4096)).astype(np.float32)
    error = _value(gaussian, format="mxfp4")[0] - gaussian
    assert abs(-np.log2(np.linalg.norm(error) / np.linalg.norm(gaussian)) - 5.85) < 0.02


def test_the_mxfp4_bound_is_reached():
    x = RNG.uniform(-1, 1, size=(64, 16384)).astype(np.float32)
    error = np.abs(_value(x, format="mxfp4")[0] - x)
    assert (error * 64 / _alpha(x)).max() >= 0.9999


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_arithmetic_is_float32_whatever_the_input(dtype):
    x = jnp.asarray(_rows("normal"), dtype)
    got, wide = msd_decompose(x), msd_decompose(x.astype(F32))
    np.testing.assert_array_equal(got.parts, wide.parts)
    np.testing.assert_array_equal(got.scale, wide.scale)


def test_groups_and_axes():
    x = _rows("outliers", 96)
    whole = msd_decompose(x.reshape(16, 3, 32))
    grouped = msd_decompose(x, group_size=32)
    np.testing.assert_array_equal(whole.parts.reshape(2, 16, 96), grouped.parts)
    np.testing.assert_array_equal(whole.scale[..., 0], grouped.scale)
    turned = msd_decompose(x.T, axis=0, group_size=32)
    np.testing.assert_array_equal(jnp.swapaxes(turned.parts, 1, 2), grouped.parts)
    np.testing.assert_array_equal(turned.scale.T, grouped.scale)


def test_transformations_and_export_give_the_same_parts():
    x = _rows("normal", 64)
    want = msd_decompose(x)
    for fn in (jax.jit(msd_decompose), jax.checkpoint(msd_decompose)):
        np.testing.assert_array_equal(fn(x).parts, want.parts)
    mapped = jax.jit(jax.vmap(msd_decompose))(x)
    np.testing.assert_array_equal(jnp.swapaxes(mapped.parts, 0, 1), want.parts)
    scanned = jax.lax.scan(lambda c, row: (c, msd_decompose(row)), 0, x)[1]
    np.testing.assert_array_equal(scanned.scale, want.scale)
    (rows,) = export.symbolic_shape("rows")
    exported = export.export(jax.jit(lambda x: tuple(msd_decompose(x))))(
        jax.ShapeDtypeStruct((rows, 64), F32)
    )
    again = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x)[0], want.parts)
    gradient = jax.grad(lambda x: msd_decompose(x).scale.sum())(jnp.array([[1.0, -3.0]], F32))
    np.testing.assert_allclose(gradient, [[0, -1 / 127]], rtol=1e-6)


def test_a_row_with_an_infinity_is_nan_under_jit_and_spares_the_others():
    x = jnp.array([[1.0, jnp.inf], [jnp.nan, 1.0], [1.0, 2.0]], F32)
    parts, scale = jax.jit(msd_decompose)(x)
    np.testing.assert_array_equal(jnp.isnan(scale[:, 0]), [True, True, False])
    assert not parts[:, :2].any()


def test_the_cost_is_one_kernel_over_the_row():
    rows = export.symbolic_shape("rows")[0]
    program = trace(
        lambda x: tuple(msd_decompose(x)), jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16)
    )
    assert len(program.operations) == 1
    totals = program.totals({"rows": 3.0})
    assert totals["read_bytes"] == 3 * 512 * 2
    assert totals["write_bytes"] == 3 * (2 * 512 + 4)
    assert totals["vector_bytes"] == 4 * 3 * 512 * 10


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: msd_decompose(jnp.ones(4, int)), TypeError, "x must be float32, bfloat16"),
        (lambda: msd_decompose(np.float32(1)), ValueError, "x has 0 axes"),
        (lambda: msd_decompose(jnp.ones(4, F32), axis=1), ValueError, "there is no axis 1"),
        (
            lambda: msd_decompose(jnp.ones(4, F32), passes=4),
            ValueError,
            "passes must be 1 to 3",
        ),
        (
            lambda: msd_decompose(jnp.ones(32, F32), passes=0),
            ValueError,
            "passes must be 1 to 3",
        ),
        (
            lambda: msd_decompose(jnp.ones(32, F32), passes=3, format="mxfp4"),
            ValueError,
            "passes must be 1 to 2 for mxfp4",
        ),
        (
            lambda: msd_decompose(jnp.ones(4, F32), format="fp8"),
            ValueError,
            '"int8" or "mxfp4"',
        ),
        (
            lambda: msd_decompose(jnp.ones(4, F32), rounding="up"),
            ValueError,
            '"away" or "even"',
        ),
        (
            lambda: msd_decompose(jnp.ones(9, F32), group_size=4),
            ValueError,
            "the axis has 9 values",
        ),
        (lambda: msd_decompose(jnp.ones(0, F32)), ValueError, "the axis has 0 values"),
        (
            lambda: msd_decompose(jnp.ones(48, F32), format="mxfp4"),
            ValueError,
            "has 48 values",
        ),
        (
            lambda: msd_decompose(jnp.ones(64, F32), format="mxfp4", group_size=64),
            ValueError,
            "32 values, got group_size=64",
        ),
        (
            lambda: msd_decompose(jnp.array([1.0, jnp.inf], F32)),
            ValueError,
            "infinities or NaN",
        ),
        (
            lambda: jax.jit(lambda: msd_decompose(np.array([np.nan], np.float32)))(),
            ValueError,
            "infinities or NaN",
        ),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, error, message):
    with pytest.raises(error, match=message):
        build()
