"""Products of large activations and small weights: what fits in the end saturates nowhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from cmjax import native
from cmjax.primitives.grouped import grouped_msd_dot
from cmjax.primitives.msd import QuantizedWeight, quantize_weight
from cmjax.primitives.msd.product import msd_dot

SIZES = [(1e34, 0.01), (3e38, 1e-5), (-2e36, 1e-4)]


def _operands(size, weight):
    """1,024 products of 1e34 with 127 steps are beyond float32 before they meet their scale."""
    rng = np.random.default_rng(0)
    x = (size * rng.uniform(0.5, 1, (2, 1024))).astype(np.float32)
    x[1] *= 1e-10
    w = rng.integers(100, 128, (8, 1024)).astype(np.int8)
    return x, w, np.full(8, weight / 127, np.float32)


@pytest.mark.parametrize("size, weight", SIZES)
def test_a_result_that_fits_does_not_saturate_on_its_way(size, weight):
    x, w, scale = _operands(size, weight)
    for options in ({}, {"bias": scale}, {"offset": np.full(8, 0.5, np.float32)}, {"passes": 3}):
        fn = jax.jit(lambda x, options=options: msd_dot(x, w, w_scale=scale, **options))
        steps = w + options.get("offset", np.zeros(8))[:, None]
        exact = x.astype(np.float64) @ (steps * np.float64(scale[0])).T
        np.testing.assert_allclose(fn(x), exact, rtol=1e-5)
        np.testing.assert_array_equal(export.export(fn)(x).call(x), fn(x))
    groups = np.full((8, 4), weight / 127, np.float32)
    grouped = msd_dot(x, w, w_scale=groups, group_size=256)
    np.testing.assert_allclose(grouped, x.astype(np.float64) @ (w * groups[:, :1]).T, rtol=1e-5)


@pytest.mark.parametrize("size, weight", SIZES)
def test_a_result_of_a_group_that_fits_does_not_saturate_on_its_way(size, weight):
    x, w, scale = _operands(size, weight)
    stack = QuantizedWeight(
        values=jnp.stack([w, w // 2, -w]), scale=jnp.stack([scale, scale, scale]), format="int8"
    )
    fn = jax.jit(lambda x: grouped_msd_dot(x, stack, jnp.array([1, 0, 1])))
    exact = x.astype(np.float64) @ (w * np.float64(scale[0])).T * [[1], [-1]]
    np.testing.assert_allclose(fn(x), exact, rtol=1e-5)
    np.testing.assert_array_equal(export.export(fn)(x).call(x), fn(x))


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_result_beyond_float32_saturates_whatever_the_signs_on_its_way(
    format, kernels, monkeypatch
):
    if not kernels:
        off = dataclasses.replace(native.status(), enabled=False)
        monkeypatch.setattr("cmjax.primitives.define.status", lambda: off)
    steps = jnp.tile(jnp.array([1.0, -1.0], jnp.float32), 32)
    w = quantize_weight(jnp.stack([abs(steps), -abs(steps), steps])[None], format=format)
    x = jnp.full((1, 64), 3e38, jnp.float32)
    largest = np.finfo(np.float32).max
    one = jax.tree.map(lambda a: a[0], w)
    products = (
        lambda x, bias: msd_dot(x, one, bias=bias),
        lambda x, bias: grouped_msd_dot(x, w, jnp.array([1])) + bias,
    )
    for product in products:
        y = jax.jit(product)(x, jnp.array([0, 0, 1], jnp.float32))
        np.testing.assert_array_equal(y, [[largest, -largest, 1]])


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_large_rows_with_small_weights_in_either_format_and_with_or_without_groups(format):
    x = jnp.full((1, 1024), 1e34, jnp.float32)
    w = quantize_weight(jnp.full((1, 4, 1024), 0.01, jnp.float32), format=format)
    step = 1 if format == "int8" else 0.25  # of MXFP4's weights and of its activations
    one = jax.tree.map(lambda a: a[0], w)
    for y in (jax.jit(msd_dot)(x, one), jax.jit(grouped_msd_dot)(x, w, jnp.array([1]))):
        np.testing.assert_allclose(y, 1.024e35, rtol=1e-5 if format == "int8" else step)


def test_a_row_that_is_not_finite_gives_nan_beside_large_ones():
    rows = [[1e34] * 8, [jnp.nan] + [1.0] * 7, [jnp.inf] + [1.0] * 7, [1.0] * 8]
    x = jnp.array(rows, jnp.float32)
    w = quantize_weight(jnp.full((1, 4, 8), 0.01, jnp.float32))
    one = jax.tree.map(lambda a: a[0], w)
    for y in (jax.jit(msd_dot)(x, one), jax.jit(grouped_msd_dot)(x, w, jnp.array([4]))):
        assert np.isnan(y[1:3]).all()
        np.testing.assert_allclose(y[0], 8e32, rtol=1e-5)
        np.testing.assert_allclose(y[3], 0.08, rtol=1e-5)
