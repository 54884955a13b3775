"""On-device sampling: greedy, nucleus, and frequencies."""

import jax.numpy as jnp
import numpy as np

from cmjax.models.moe.sample import sample

LOGITS = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))


def _drawn(temperature, top_p, draws=10000):
    uniform = (jnp.arange(draws) + 0.5) / draws  # every quantile once: frequencies are exact
    full = jnp.full((draws,), 1.0)
    logits = jnp.broadcast_to(LOGITS, (draws, 4))
    tokens = sample(logits, uniform, temperature * full, top_p * full)
    return np.bincount(np.asarray(tokens), minlength=4) / draws


def test_temperature_zero_is_greedy():
    np.testing.assert_array_equal(_drawn(0.0, 1.0), [0, 1, 0, 0])


def test_frequencies_are_the_softmax():
    np.testing.assert_allclose(_drawn(1.0, 1.0), [0.1, 0.5, 0.15, 0.25], atol=2e-4)


def test_temperature_sharpens():
    squared = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose(_drawn(0.5, 1.0), squared / squared.sum(), atol=2e-4)


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    np.testing.assert_allclose(_drawn(1.0, 0.7), [0, 2 / 3, 0, 1 / 3], atol=2e-4)
    np.testing.assert_allclose(_drawn(1.0, 0.8), [0, 5 / 9, 1.5 / 9, 2.5 / 9], atol=2e-4)
    np.testing.assert_array_equal(_drawn(1.0, 0.0), [0, 1, 0, 0])


def test_requests_are_sampled_each_in_its_own_way():
    logits = jnp.stack([LOGITS, LOGITS[::-1]])
    tokens = sample(logits, jnp.array([0.99, 0.0]), jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(tokens, [0, 2])
