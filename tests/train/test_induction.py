"""The planted heads: one looks at the token before, the other at what followed the present one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.models.moe.config import GroupedAttention
from cmjax.models.moe.layers.rope import angles, rotate
from train.induction import directions, look_back, match, write_down
from train.passkey import Recall

CONFIG = Recall().model_config()
DIM, PLACES = CONFIG.attention.rope_dim, 64


def _drawn(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _weights(x, qkv):
    """Attention of head 0 from every place to every place up to it."""
    qkv = x @ qkv
    cos, sin = angles(jnp.arange(len(x)), CONFIG)
    q, k = (rotate(qkv[:, at : at + DIM], cos, sin, interleave=True) for at in (0, 2 * DIM))
    scores = np.where(np.tri(len(x)), np.asarray(q @ k.T) * DIM**-0.5, -np.inf)
    return np.asarray(jax.nn.softmax(scores, axis=-1))


def test_the_lower_head_looks_at_the_token_before_whatever_the_other_widths_hold():
    qkv, x = _drawn(64, 6 * DIM), _drawn(PLACES, 64)
    x[:, 0] = 2.0
    made = look_back(jnp.asarray(qkv), CONFIG)
    assert np.diagonal(_weights(x, made), offset=-1).min() > 0.95
    np.testing.assert_array_equal(made[:, DIM : 2 * DIM], qkv[:, DIM : 2 * DIM])  # the other head
    np.testing.assert_array_equal(made[:, 3 * DIM :], qkv[:, 3 * DIM :])  # its keys, and values


def test_the_upper_head_finds_what_followed_the_present_token():
    chosen, tokens = directions(CONFIG, seed=0), _drawn(PLACES, 64)
    tokens[-1] = tokens[20]
    before = np.pad(tokens, ((1, 0), (0, 0)))[:-1]  # what a perfect lower head looks at
    value = before @ write_down(jnp.zeros((64, 6 * DIM)), chosen, CONFIG)[:, 4 * DIM : 5 * DIM]
    x = tokens + 3 * value[:, : len(chosen.write)] @ chosen.write
    weights = _weights(np.asarray(x), match(jnp.asarray(_drawn(64, 6 * DIM)), chosen, CONFIG, 20.0))
    assert np.argmax(weights[-1]) == 21


def test_directions_are_orthonormal_and_leave_width_0_alone():
    rows = np.concatenate(directions(CONFIG, seed=3))
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-6)
    np.testing.assert_array_equal(rows[:, 0], 0)


def test_heads_too_wide_for_the_directions_are_refused():
    attention = GroupedAttention(kv_heads=2, head_dim=128)
    wide = dataclasses.replace(CONFIG, attention=attention)
    with pytest.raises(ValueError, match="do not fit the 63 free widths of hidden_size 64"):
        directions(wide, seed=0)
