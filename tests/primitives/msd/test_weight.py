"""Few-bit weights against their formats' definitions, in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.primitives.msd import mxfp4
from cmjax.primitives.msd.kv import keys_of, quantize_kv, values_of
from cmjax.primitives.msd.weight import dequantize_weight, quantize_weight

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 128)).astype(np.float32)


def test_codes_are_those_of_float4_e2m1fn():
    codes = np.arange(16, dtype=np.uint8)
    packed = (codes[0::2] | codes[1::2] << 4)[None]
    want = np.array(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], ml_dtypes.float4_e2m1fn
    )
    np.testing.assert_array_equal(mxfp4.unpack(jnp.asarray(packed))[0] / 2, want.astype(float))
    steps = mxfp4.unpack(jnp.asarray(packed))
    minus_zero = codes == 8  # packs as plain zero
    again = mxfp4.unpack(mxfp4.pack(steps))
    np.testing.assert_array_equal(again, steps)
    assert int(mxfp4.pack(steps)[0, 4]) & 15 == 0 and minus_zero.sum() == 1


def test_rounding_to_even_codes_is_that_of_float4_e2m1fn():
    v = np.concatenate([np.arange(-48, 49) / 8, RNG.uniform(-6, 6, 200)]).astype(np.float32)
    got = mxfp4.round_to_e2m1(jnp.asarray(2 * v), "even") / 2
    np.testing.assert_array_equal(got, v.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    away = mxfp4.round_to_e2m1(jnp.array([0.5, 2.5, 5.0, -7.0, 10.0], jnp.float32), "away")
    np.testing.assert_array_equal(away, [1, 3, 6, -8, 12])


@settings(max_examples=50, deadline=None)
@given(st.floats(2.0**-120, 2.0**127, width=32))
def test_exponents_are_the_smallest_that_hold_the_value(x):
    e = int(mxfp4.ceil_log2(jnp.float32(x)))
    assert 2.0 ** (e - 1) < x <= 2.0**e
    e = int(mxfp4.ceil_log2_of_sixth(jnp.float32(x)))
    assert 6 * 2.0 ** (e - 1) < x <= 6 * 2.0**e


def test_exponents_of_powers_of_two_and_their_neighbours():
    for k in (-100, -1, 0, 1, 126):
        x = np.float32(2.0**k)
        around = jnp.array([np.nextafter(x, np.float32(0)), x, np.nextafter(x, np.float32(2e38))])
        np.testing.assert_array_equal(mxfp4.ceil_log2(around), [k, k, k + 1])


@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_int8_is_within_half_a_step(group_size, symmetric, shift):
    w = W + np.float32(shift)
    q = quantize_weight(w, group_size=group_size, symmetric=symmetric)
    assert q.values.dtype == jnp.int8 and q.values.shape == w.shape
    assert q.scale.shape == ((6,) if group_size is None else (6, 128 // group_size))
    assert (q.offset is None) == symmetric
    step = np.repeat(np.asarray(q.scale).reshape(6, -1), group_size or 128, axis=1)
    assert (np.abs(np.asarray(dequantize_weight(q)) - w) <= 0.5 * step + 1e-5).all()
    if symmetric:
        assert np.abs(np.asarray(q.values)).max() == 127
    else:
        assert np.asarray(q.values).min() == -128 and np.asarray(q.values).max() == 127


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_and_of_one_value_survive(symmetric):
    w = np.zeros((3, 32), np.float32)
    w[1], w[2] = -0.7, 3e38
    got = dequantize_weight(quantize_weight(w, symmetric=symmetric))
    np.testing.assert_allclose(got, w, rtol=1e-5)


def test_mxfp4_takes_the_scale_that_just_holds_the_block_and_half_the_memory():
    w = np.concatenate([W, np.zeros((1, 128)), 1e-20 * W, 1e37 * W]).astype(np.float32)
    q = quantize_weight(w, format="mxfp4")
    assert q.values.dtype == jnp.uint8 and q.values.shape == (w.shape[0], 64)
    assert q.scale.dtype == jnp.uint8 and q.scale.shape == (w.shape[0], 4)
    scale = 2.0 ** (np.repeat(np.asarray(q.scale, float), 32, axis=1) - 127)
    with np.errstate(over="ignore"):
        want = (w / scale).astype(ml_dtypes.float4_e2m1fn).astype(float) * scale
    np.testing.assert_array_equal(np.asarray(dequantize_weight(q), float), want)
    top = np.abs(w).reshape(w.shape[0], 4, 32).max(-1)
    exponent = np.asarray(q.scale, float) - 127
    some = top > 0
    assert (top <= 6 * 2.0**exponent)[some].all() and (top > 6 * 2.0 ** (exponent - 1))[some].all()


def test_a_weight_is_a_pytree_under_jit_and_vmap():
    stacked = jax.jit(quantize_weight)(np.stack([W, 2 * W]))
    np.testing.assert_array_equal(stacked.values[1], quantize_weight(2 * W).values)
    mapped = jax.vmap(lambda w: quantize_weight(w, format="mxfp4"))(np.stack([W, 2 * W]))
    np.testing.assert_array_equal(mapped.scale[1], quantize_weight(2 * W, format="mxfp4").scale)
    assert mapped.format == "mxfp4" and mapped.group_size == 32


@pytest.mark.parametrize(
    "format, per", [("int8", "token"), ("int8", "channel"), ("mxfp4", "token")]
)
def test_caches_stand_for_keys_and_values_within_their_steps(format, per):
    k, v = RNG.normal(size=(2, 2, 64, 3, 32)).astype(np.float32)
    cache = quantize_kv(k, v, format=format, per=per)
    for got, want, axis in (
        (keys_of(cache.k, cache.k_scale, format), k, -1),
        (values_of(cache.v, cache.v_scale, format), v, -1 if per == "token" else 1),
    ):
        if format == "int8":
            bound = np.abs(want).max(1 if per == "channel" else axis, keepdims=True) / 254
        else:
            bound = np.abs(want).max() / 6  # half of the widest gap, 2 of at most 2 max / 6
        assert (np.abs(got - want) <= 1.0001 * bound).all()


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: quantize_weight(W, format="int4"), ValueError, '"int8" or "mxfp4"'),
        (lambda: quantize_weight(W[0]), TypeError, r"features, inner\], got float32\[128\]"),
        (lambda: quantize_weight(W.astype(int)), TypeError, "w must be floating point"),
        (lambda: quantize_weight(W, group_size=48), ValueError, "multiple of the group size"),
        (lambda: quantize_weight(W, group_size=0), ValueError, "multiple of the group size"),
        (lambda: quantize_weight(W[:, :48], format="mxfp4"), ValueError, "dimension 48"),
        (
            lambda: quantize_weight(W, format="mxfp4", group_size=64),
            ValueError,
            "32 values, got group_size=64",
        ),
        (lambda: quantize_weight(W, format="mxfp4", symmetric=False), ValueError, "no offset"),
        (lambda: quantize_weight(W / np.float32(0)), ValueError, "infinities or NaN"),
        (lambda: quantize_weight(W[:, :0]), ValueError, "got 0 columns"),
        (lambda: quantize_kv(W, W), ValueError, "k must be floating point"),
        (
            lambda: quantize_kv(W[None, :, :, None], W[None, :3, :, None]),
            ValueError,
            "agree in all but d",
        ),
        (lambda: quantize_kv(W[None, None], W[None, None], per="head"), ValueError, '"token" or'),
        (
            lambda: quantize_kv(W[None, None], W[None, None], format="mxfp4"),
            ValueError,
            "multiples of 32",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_inputs_are_refused_with_what_would_do(build, error, message):
    with pytest.raises(error, match=message):
        build()
