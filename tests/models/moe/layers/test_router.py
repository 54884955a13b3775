"""Group-limited routing against a NumPy float64 reading of the paper."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.models.moe.layers.router import gate
from cmjax.models.moe.presets import deepseek_v3, glm_4_7, tiny


def _numpy(logits, bias, config):
    chosen, weights = [], []
    size = config.routed_experts // config.expert_groups
    for row in logits.astype(np.float64):
        scores = 1 / (1 + np.exp(-row))
        if config.scoring == "softmax":
            scores = np.exp(row) / np.exp(row).sum()
        biased = scores + bias
        strength = [
            np.sort(biased[g * size : (g + 1) * size])[-config.group_best :].sum()
            for g in range(config.expert_groups)
        ]
        groups = np.argsort(strength)[::-1][: config.groups_per_token]
        allowed = [e for e in range(config.routed_experts) if e // size in groups]
        best = sorted(allowed, key=lambda e: -biased[e])[: config.experts_per_token]
        weight = scores[best]
        if config.normalize_weights:
            weight = weight / weight.sum()
        chosen.append(best)
        weights.append(weight * config.routed_scale)
    return np.array(chosen), np.array(weights)


SOFTMAX = dataclasses.replace(tiny(), scoring="softmax", score_bias=False, group_best=1)
CONFIGS = {
    "tiny": tiny(),
    "deepseek-v3": deepseek_v3(),
    "glm-4.7": glm_4_7(),
    "unnormalised": dataclasses.replace(tiny(), normalize_weights=False),
    "deepseek-v2": dataclasses.replace(SOFTMAX, normalize_weights=False, routed_scale=16.0),
    "qwen3": dataclasses.replace(SOFTMAX, expert_groups=1, groups_per_token=1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_routing_equals_numpy(config):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, config.routed_experts)).astype(np.float32)
    bias = rng.normal(size=config.routed_experts).astype(np.float32) * 0.1 * config.score_bias
    given = jnp.asarray(bias) if config.score_bias else None
    chosen, weights = gate(jnp.asarray(logits), given, config)
    want, want_weights = _numpy(logits, bias, config)
    np.testing.assert_array_equal(chosen, want)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5)


def test_the_bias_chooses_but_does_not_weigh():
    config = tiny()
    logits = jnp.zeros((1, 16))
    bias = jnp.zeros(16).at[jnp.array([0, 1, 4, 5])].set(5.0)
    chosen, weights = gate(logits, bias, config)
    assert sorted(chosen[0].tolist()) == [0, 1, 4, 5]
    np.testing.assert_allclose(weights, config.routed_scale / 4, rtol=1e-6)


def test_a_strongly_negative_bias_never_lets_a_forbidden_group_in():
    config = tiny()
    bias = jnp.full(16, -3.0).at[:8].set(-2.0)  # every biased score is negative
    chosen, _ = gate(jnp.zeros((1, 16)), bias, config)
    assert max(chosen[0].tolist()) < 8
