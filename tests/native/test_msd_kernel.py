"""The MSD kernels of every instruction set against exact integer and float64 NumPy."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import native
from cmjax.primitives.msd.product import _reference, msd_dot

pytestmark = pytest.mark.skipif(
    not native.status().enabled, reason=f"no kernels: {native.status().reason}"
)

SHAPES = [  # rows, features, inner: odd everywhere, tails of every vector length, more than a task
    (1, 1, 1),
    (1, 5, 7),
    (2, 33, 100),
    (4, 3, 4097),
    (13, 35, 129),
    (70, 37, 96),
]
KINDS = ("normal", "all extreme", "alternating", "zeros and outlier", "huge", "tiny")


def _activations(kind, rows, inner, rng):
    x = rng.normal(size=(rows, inner))
    match kind:
        case "all extreme":
            x = np.ones_like(x)
        case "alternating":
            x = np.where(np.arange(inner) % 2, 1.0, -1.0) * np.ones_like(x)
        case "zeros and outlier":
            x[...] = 0
            x[0, -1] = 5
        case "huge":
            x = np.clip(1e37 * x, -3e38, 3e38)
        case "tiny":
            x *= 1e-32  # under 2**-100: counts as zero
    return x.astype(np.float32)


def _split(x):
    """The vendor's two int8 parts, in float32 as defined, and M."""
    top = np.abs(x).max(-1, keepdims=True)
    good = top >= 2.0**-100
    u = np.where(good, x * np.where(good, np.float32(127) / np.where(good, top, 1), 0), 0)
    u = u.astype(np.float32)

    def away(v):
        whole = np.trunc(v)
        return whole + np.copysign((np.abs(v - whole) >= 0.5).astype(np.float32), v)

    a1 = away(u)
    return a1, away(np.float32(254) * (u - a1)), np.where(good, top, 0)


def _by_hand(x, w, scale, offset, bias):
    """The definition, bit by bit: an exact integer, then float32 operations one by one."""
    a1, a2, top = _split(x)
    a = 254 * a1.astype(np.int64) + a2.astype(np.int64)
    shrink = np.where(top >= 2.0**100, np.float32(2.0**-64), np.float32(1))  # headroom for the sum
    unit = (top * shrink * np.float32(1 / (127 * 254))).astype(np.float32)
    largest = np.finfo(np.float32).max
    y = (a @ w.T.astype(np.int64)).astype(np.float32) * unit
    if offset is not None:
        y = np.clip(y, -largest, largest)
        y = y + np.clip(
            offset * (a.sum(-1, keepdims=True).astype(np.float32) * unit), -largest, largest
        )
    y = np.clip(y * scale, -largest, largest)
    y = np.clip(y / shrink, -largest, largest)
    return y if bias is None else np.clip(y + bias, -largest, largest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_int8_is_the_definition_bit_by_bit(kind):
    rng = np.random.default_rng(0)
    for rows, features, inner in SHAPES:
        x = _activations(kind, rows, inner, rng)
        w = rng.integers(-128, 128, size=(features, inner)).astype(np.int8)
        if kind == "all extreme":
            w[...] = -128
        scale = rng.uniform(0.01, 0.1, size=features).astype(np.float32)
        offset, bias = rng.normal(size=(2, features)).astype(np.float32) * 20
        for o, b in ((None, None), (offset, bias)):
            got = msd_dot(x, w, w_scale=scale, offset=o, bias=b)
            np.testing.assert_array_equal(got, _by_hand(x, w, scale, o, b))


@pytest.mark.parametrize("kind", KINDS)
def test_mxfp4_is_the_exact_sum_to_a_few_units_in_the_last_place(kind):
    """Products are exact, so the tolerance is that of adding `inner / 32` block sums in float32
    (and the lanes' sums): no term can be off by more than one unit per addition."""
    rng = np.random.default_rng(0)
    half_steps = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
    for rows, features, inner in [(1, 1, 32), (3, 4, 96), (5, 35, 1056), (40, 33, 160)]:
        x = _activations(kind, rows, inner, rng)
        w = rng.integers(0, 256, size=(features, inner // 2)).astype(np.uint8)
        exponents = rng.integers(100, 130, size=(features, inner // 32)).astype(np.uint8)
        bias = rng.normal(size=features).astype(np.float32)
        got = np.asarray(msd_dot(x, w, w_scale=exponents, format="mxfp4", bias=bias), np.float64)
        steps = half_steps[np.stack([w & 15, w >> 4], -1).reshape(features, inner)]
        dense = steps * np.repeat(2.0 ** (exponents.astype(float) - 128), 32, axis=1)
        rows_of = jax.jit(lambda x: _rounded_rows(x))(x)
        exact = np.asarray(rows_of, np.float64) @ dense.T + bias
        size = np.abs(np.asarray(rows_of, np.float64)) @ np.abs(dense).T + np.abs(bias)
        finite = size < 1e38
        assert (np.abs(got - exact)[finite] <= ((inner / 32 + 8) * 2.0**-24 * size)[finite]).all()


def _rounded_rows(x):
    """The reference's value of x's two mxfp4 parts; tested against the format elsewhere."""
    from_parts = jnp.eye(x.shape[-1], dtype=jnp.float32)
    codes = jnp.where(from_parts > 0, 2, 0).astype(jnp.uint8)  # E2M1 code 2 is 1.0
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    ones = jnp.full((x.shape[-1], x.shape[-1] // 32), 127, jnp.uint8)
    return _reference(
        x,
        packed,
        ones,
        format="mxfp4",
        passes=2,
        group_size=32,
        has_offset=False,
        out_dtype="float32",
        rounding="away",
    )


def test_stacks_and_empty_operands():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 96)).astype(np.float32)
    w = rng.integers(-128, 128, size=(3, 7, 96)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, size=(3, 7)).astype(np.float32)
    got = jax.vmap(lambda x, w, s: msd_dot(x, w, w_scale=s))(x, w, scale)
    for i in range(3):
        np.testing.assert_array_equal(got[i], _by_hand(x[i], w[i], scale[i], None, None))
    assert msd_dot(x[0, :0], w[0], w_scale=scale[0]).shape == (0, 7)
    assert msd_dot(x[0], w[0, :0], w_scale=scale[0, :0]).shape == (5, 0)


def test_the_kernel_is_what_runs_and_gives_the_bits_of_xla():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5000)).astype(np.float32)
    w = rng.integers(-128, 128, size=(40, 5000)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, size=40).astype(np.float32)
    fn = jax.jit(lambda x: msd_dot(x, w, w_scale=scale, offset=scale, bias=scale))
    assert "cmjax_msd_int8" in fn.lower(x).as_text()
    operands = [jnp.asarray(a) for a in (x, w, scale, scale, scale)]
    plain = jax.jit(
        lambda *a: _reference(
            *a,
            format="int8",
            passes=2,
            group_size=None,
            has_offset=True,
            out_dtype="float32",
            rounding="away",
        )
    )
    np.testing.assert_array_equal(fn(x), plain(*operands))


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_instruction_set_passes_these_tests(isa):
    if os.environ.get("CMJAX_NATIVE_ISA"):
        pytest.skip("already inside such a run")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-qx",
            "-k",
            "bit_by_bit or exact_sum or stacks",
            __file__,
        ],
        env=os.environ | {"CMJAX_NATIVE_ISA": isa, "CMJAX_NATIVE": "on"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]


def _call(target, result, *operands):
    out = jax.ShapeDtypeStruct(result, jnp.float32)
    return jax.jit(lambda *a: native.call(target, out, *a))(*operands).block_until_ready()


F32, S8, U8, NONE = jnp.float32, jnp.int8, jnp.uint8, jnp.zeros(0, jnp.float32)


@pytest.mark.parametrize(
    "target, result, operands, message",
    [
        ("int8", (1, 2, 3), ((1, 2, 8), (1, 3, 9), (1, 3, 1)), "w .stack, features, inner"),
        ("int8", (1, 2, 3), ((2, 8), (1, 3, 8), (1, 3, 1)), "x must be .stack, rows, inner"),
        ("int8", (1, 2, 3), ((1, 2, 8), (2, 3, 8), (1, 3, 1)), "x must be .stack, rows, inner"),
        ("int8", (1, 2, 3), ((1, 2, 8), (1, 3, 8), (1, 4, 1)), "scale must be"),
        ("int8", (1, 2, 4), ((1, 2, 8), (1, 3, 8), (1, 3, 1)), "the result must be"),
        ("int8", (1, 1, 1), ((1, 1, 132105), (1, 1, 132105), (1, 1, 1)), "inner is too long"),
        ("mxfp4", (1, 2, 3), ((1, 2, 48), (1, 3, 24), (1, 3, 1)), "a multiple of 32"),
        ("mxfp4", (1, 2, 3), ((1, 2, 64), (1, 3, 16), (1, 3, 2)), "inner / 2"),
        ("mxfp4", (1, 2, 3), ((1, 2, 64), (1, 3, 32), (1, 3, 1)), "scale must be"),
        ("mxfp4", (1, 2, 4), ((1, 2, 64), (1, 3, 32), (1, 3, 2)), "the result must be"),
    ],
)
def test_wrong_buffers_are_refused(target, result, operands, message):
    dtypes = (F32, S8, F32) if target == "int8" else (F32, U8, U8)
    arrays = [jnp.zeros(s, d) for s, d in zip(operands, dtypes, strict=True)]
    extra = (NONE,) if target == "int8" else ()
    with pytest.raises(Exception, match=message):
        _call(f"cmjax_msd_{target}", result, *arrays, *extra)


def test_an_offset_of_another_length_is_refused():
    operands = jnp.zeros((1, 2, 8), F32), jnp.zeros((1, 3, 8), S8), jnp.zeros((1, 3, 1), F32)
    with pytest.raises(Exception, match="offset must be empty or have"):
        _call("cmjax_msd_int8", (1, 2, 3), *operands, jnp.zeros(2, F32))
