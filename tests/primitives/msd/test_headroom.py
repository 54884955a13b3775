"""Products of large activations and small weights: what fits in the end saturates nowhere."""

import jax
import numpy as np
import pytest
from jax import export

from cmjax.primitives.msd.product import msd_dot


@pytest.mark.parametrize("size, weight", [(1e34, 0.01), (3e38, 1e-5), (-2e36, 1e-4)])
def test_a_result_that_fits_does_not_saturate_on_its_way(size, weight):
    """1,024 products of 1e34 with 127 steps are beyond float32 before they meet their scale."""
    rng = np.random.default_rng(0)
    x = (size * rng.uniform(0.5, 1, (2, 1024))).astype(np.float32)
    x[1] *= 1e-10
    w = rng.integers(100, 128, (8, 1024)).astype(np.int8)
    scale = bias = np.full(8, weight / 127, np.float32)
    for options in ({}, {"bias": bias}, {"offset": np.full(8, 0.5, np.float32)}, {"passes": 3}):
        fn = jax.jit(lambda x, options=options: msd_dot(x, w, w_scale=scale, **options))
        steps = w + options.get("offset", np.zeros(8))[:, None]
        exact = x.astype(np.float64) @ (steps * np.float64(scale[0])).T
        np.testing.assert_allclose(fn(x), exact, rtol=1e-5)
        np.testing.assert_array_equal(export.export(fn)(x).call(x), fn(x))
    groups = np.full((8, 4), weight / 127, np.float32)
    grouped = msd_dot(x, w, w_scale=groups, group_size=256)
    np.testing.assert_allclose(grouped, x.astype(np.float64) @ (w * groups[:, :1]).T, rtol=1e-5)
