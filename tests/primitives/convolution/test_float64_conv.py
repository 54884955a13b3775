"""Convolution of float64 signals and filters, against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives.convolution import prepack, winograd_conv1d


@pytest.mark.parametrize("algorithm", ["direct", "F(4,3)", "F(6,3)", "N66", "N88"])
def test_float64_is_computed_in_float64(algorithm):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, 50, 6))
        w = rng.normal(size=(5 if algorithm == "N66" else 7 if algorithm == "N88" else 3, 6, 4))
        for groups in (1, 2):
            filters = w[:, : 6 // groups]
            y = winograd_conv1d(x, filters, algorithm=algorithm, groups=groups)
            want = jax.lax.conv_general_dilated(
                x,
                filters,
                (1,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=groups,
            )
            assert y.dtype == jnp.float64
            np.testing.assert_allclose(y, want, atol=1e-11)
            ready = prepack(filters, algorithm=algorithm, groups=groups)
            np.testing.assert_allclose(winograd_conv1d(x, ready), want, atol=1e-11)
