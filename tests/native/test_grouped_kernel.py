"""The kernel of grouped products, called as its primitives call it: sizes, dtypes, threads."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import native

pytestmark = pytest.mark.skipif(not native.status().enabled, reason=native.status().reason)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def _call(x, w, starts, counts, *, skip=False):
    dtype = jnp.int32 if x.dtype == jnp.int8 else x.dtype
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), dtype)
    starts, counts = jnp.asarray(starts, jnp.int32), jnp.asarray(counts, jnp.int32)
    call = lambda *a: native.call("cmjax_grouped_dot", out, *a, skip_zeros=np.bool_(skip))  # noqa: E731
    return jax.jit(call)(x, w, starts, counts).block_until_ready()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 12, 13, 65])
@pytest.mark.parametrize("inner, features", [(1, 1), (4, 63), (130, 65), (129, 257), (600, 520)])
def test_every_width_depth_and_number_of_rows(rng, dtype, count, inner, features):
    if dtype == "int8" and native.status().isa == "scalar":
        pytest.skip("int8 is left to XLA here")
    # integers: every order of sums gives the same float32
    x = jnp.asarray(rng.integers(-8, 9, (2 * count + 1, inner)), dtype)
    w = jnp.asarray(rng.integers(-8, 9, (3, inner, features)), dtype)
    got = np.asarray(_call(x, w, [count, 0, 0], [count, 0, count]), np.float64)
    whole = [np.asarray(a, np.float64) for a in (x, w)]
    wanted = np.zeros((2 * count + 1, features))
    wanted[count : 2 * count] = whole[0][count : 2 * count] @ whole[1][0]
    wanted[:count] = whole[0][:count] @ whole[1][2]
    if dtype == "bfloat16":
        wanted = np.asarray(jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16), np.float64)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rows", [7, 40])
def test_the_largest_integers_do_not_overflow(rows):
    if native.status().isa == "scalar":
        pytest.skip("int8 is left to XLA here")
    for a in (-128, 127):
        for b in (-128, 127):
            x, w = jnp.full((rows, 1000), a, jnp.int8), jnp.full((1, 1000, 70), b, jnp.int8)
            assert (np.asarray(_call(x, w, [0], [rows])) == 1000 * a * b).all()


def test_nan_and_infinity_pass_through_bfloat16():
    x = jnp.asarray([[jnp.nan], [jnp.inf], [-jnp.inf], [1.0]], jnp.bfloat16)
    got = np.asarray(_call(x, jnp.ones((1, 1, 3), jnp.bfloat16), [0], [4]), np.float32)
    np.testing.assert_array_equal(got, np.repeat([[np.nan], [np.inf], [-np.inf], [1]], 3, 1))


@pytest.mark.parametrize("starts, counts", [([0], [5]), ([-1], [1]), ([0], [-1]), ([4], [1])])
def test_groups_outside_the_buffer_are_refused(starts, counts):
    with pytest.raises(Exception, match="negative rows, or rows beyond the buffer"):
        _call(jnp.zeros((4, 8)), jnp.zeros((1, 8, 3)), starts, counts)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(Exception, match="grouped_dot: x must be"):
        _call(jnp.zeros((4, 8)), jnp.zeros((1, 9, 3)), [0], [4])
    with pytest.raises(Exception, match="grouped_dot: x must be"):
        _call(jnp.zeros((4, 8)), jnp.zeros((2, 8, 3)), [0], [4])


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_smaller_instruction_sets_multiply_the_same(isa):
    code = (
        "import jax, jax.numpy as jnp, numpy as np\n"
        "from cmjax import native\n"
        "from cmjax.primitives.grouped import grouped_dot\n"
        f"assert native.status().isa == {isa!r}, native.status()\n"
        "rng = np.random.default_rng(0)\n"
        "for rows in (1, 3, 9):\n"
        "    for dtype in ('float32', 'bfloat16', 'int8'):\n"
        "        x = jnp.asarray(rng.integers(-8, 9, (rows, 70)), dtype)\n"
        "        w = jnp.asarray(rng.integers(-3, 4, (2, 70, 150)), dtype)\n"
        "        y = jax.jit(grouped_dot)(x, w, jnp.array([0, rows]))\n"
        "        wanted = np.asarray(x, np.int32) @ np.asarray(w[1], np.int32)\n"
        "        wanted = jnp.asarray(wanted, y.dtype)\n"
        "        np.testing.assert_array_equal(np.asarray(y), np.asarray(wanted))\n"
    )
    environment = os.environ | {"CMJAX_NATIVE_ISA": isa}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if native.status().isa == "scalar" and isa == "avx2":
        pytest.skip("this machine has no AVX2")
    assert found.returncode == 0, found.stderr[-2000:]
