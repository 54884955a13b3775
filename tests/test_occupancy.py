"""The chance that a place is drawn, against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.occupancy import reach_probability


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_it_is_the_share_of_all_draws_that_hit_a_place(draws):
    shares = np.array([0.5, 0.2, 0.3])
    hit = np.zeros(3)
    for drawn in itertools.product(range(3), repeat=draws):
        hit[list(set(drawn))] += np.prod(shares[list(drawn)])
    np.testing.assert_allclose(reach_probability(shares, draws), hit, rtol=1e-14)


def test_it_has_the_derivative_of_the_formula():
    slope = jax.grad(lambda p: reach_probability(p, 8.0))(jnp.float32(0.25))
    assert float(slope) == pytest.approx(8 * 0.75**7, rel=1e-6)
