"""How far the slowest rank is above the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.cost.load import imbalance, sampling_imbalance


def test_imbalance_is_the_largest_over_the_mean_of_every_layer():
    tokens = np.array([[1, 2, 3, 6], [5, 5, 5, 5]])
    np.testing.assert_allclose(imbalance(tokens), [2.0, 1.0], rtol=1e-7)
    assert float(imbalance(tokens[0])) == 2.0
    assert float(imbalance(tokens[0] * 1000)) == 2.0


@pytest.mark.parametrize("ranks", [8, 32, 320])
@pytest.mark.parametrize("mean", [30, 300, 3000])
def test_sampling_imbalance_is_the_mean_of_the_largest_poisson_count(ranks, mean):
    counts = np.random.default_rng(0).poisson(mean, (4000, ranks))
    measured = float(np.mean(counts.max(1)) / mean)
    got = float(sampling_imbalance(mean, ranks))
    # The next term of the expansion is smaller by the square of a = sqrt(2 ln R).
    a = np.sqrt(2 * np.log(ranks))
    assert measured == pytest.approx(got, abs=(got - 1) / a**2)
    assert measured == pytest.approx(got, abs=0.15 * (got - 1) + 2e-3)


def test_one_rank_is_never_above_its_mean():
    assert float(sampling_imbalance(7.0, 1)) == 1.0
    assert sampling_imbalance(jnp.ones(3), 1).shape == (3,)


def test_more_rows_scatter_less_and_the_gradient_says_so():
    assert float(sampling_imbalance(1e12, 320)) == pytest.approx(1, abs=1e-5)
    slope = jax.grad(lambda m: sampling_imbalance(m, 320))(100.0)
    above, below = (float(sampling_imbalance(100.0 + h, 320)) for h in (0.5, -0.5))
    assert float(slope) == pytest.approx(above - below, rel=1e-3) and slope < 0
