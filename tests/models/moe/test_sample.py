"""On-device sampling: greedy, nucleus, and frequencies."""

import jax.numpy as jnp
import numpy as np

from cmjax.models.moe.sample import sample

LOGITS = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))


def _drawn(temperature, top_p, top_k=None, draws=10000):
    uniform = (jnp.arange(draws) + 0.5) / draws  # every quantile once: frequencies are exact
    full = jnp.full((draws,), 1.0)
    logits = jnp.broadcast_to(LOGITS, (draws, 4))
    limit = None if top_k is None else jnp.full((draws,), top_k, jnp.int32)
    tokens = sample(logits, uniform, temperature * full, top_p * full, limit)
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


def test_top_k_keeps_the_likeliest_and_the_nucleus_is_of_what_is_kept():
    # as transformers filters: first top k, then top p of the renormalised rest
    np.testing.assert_allclose(_drawn(1.0, 1.0, 2), [0, 2 / 3, 0, 1 / 3], atol=2e-4)
    np.testing.assert_allclose(_drawn(1.0, 1.0, 4), [0.1, 0.5, 0.15, 0.25], atol=2e-4)
    np.testing.assert_allclose(_drawn(1.0, 0.6, 2), [0, 1, 0, 0], atol=2e-4)
    np.testing.assert_allclose(_drawn(1.0, 0.8, 3), [0, 2 / 3, 0, 1 / 3], atol=2e-4)
    np.testing.assert_array_equal(_drawn(1.0, 1.0, 1), [0, 1, 0, 0])
    np.testing.assert_array_equal(_drawn(0.0, 1.0, 3), [0, 1, 0, 0])


def test_no_limit_draws_the_very_tokens_of_a_limit_beyond_the_vocabulary():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(500, 40)) * 3, jnp.float32)
    uniform = jnp.asarray(rng.random(500), jnp.float32)
    full = jnp.full((500,), 0.9)
    plain = sample(logits, uniform, full, full)
    for top_k in (40, 2**31 - 1):
        limit = jnp.full((500,), top_k, jnp.int32)
        np.testing.assert_array_equal(sample(logits, uniform, full, full, limit), plain)
