"""Latent attention against its equations in float64: expanded, absorbed, and its cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import causal, inputs, linear, randomized, rms_norm, softmax, turned
from flax import nnx

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.layers.cache import LatentCache
from cmjax.models.moe.layers.mla import MLA
from cmjax.models.moe.parallelism import one_rank
from cmjax.models.moe.positions import Rope, YarnConfig
from cmjax.models.moe.presets import tiny

TOKENS, ROOM = 7, 9
TOLERANCE = 2e-5  # float32 rounding of sums of up to 128 terms of size one
BASE = LatentAttention(q_lora_rank=24, kv_lora_rank=16, qk_nope_dim=16, qk_rope_dim=8, v_dim=12)
CASES = {
    "query latent": tiny(),
    "direct queries": dataclasses.replace(
        tiny(), attention=dataclasses.replace(BASE, q_lora_rank=None)
    ),
    "biases": dataclasses.replace(tiny(), attention=dataclasses.replace(BASE, bias=True)),
    "pairs of halves": dataclasses.replace(tiny(), rope=Rope(theta=500.0, interleave=False)),
}


@functools.cache
def _module(config: MoEConfig) -> MLA:
    arithmetic, rngs = Arithmetic.of("float32"), nnx.Rngs(params=0)
    return randomized(MLA(config, one_rank(config), arithmetic=arithmetic, rngs=rngs))


def _x(sequences=2):
    return inputs(sequences, TOKENS, tiny().hidden_size)


def _expanded(module: MLA, x):
    """(output, latent, rotated shared key as complex numbers), from DeepSeek-V2's equations 9-13
    and 37-47: every head has keys and values of its own."""
    config, sizes = module.config, module.config.attention
    assert isinstance(sizes, LatentAttention)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(module)))
    positions, rope = np.arange(x.shape[1]), config.rope
    h = rms_norm(x.astype(np.float64), p["norm"], config.norm_eps)
    low = h if "q_a" not in p else rms_norm(linear(h, p["q_a"]), p["q_norm"], 1e-6)
    q = linear(low, p["q_b"]).reshape(*x.shape[:2], config.heads, sizes.qk_dim)
    q_nope, q_rope = q[..., : sizes.qk_nope_dim], q[..., sizes.qk_nope_dim :]
    down = linear(h, p["kv_a"])
    latent = rms_norm(down[..., : sizes.kv_lora_rank], p["kv_norm"], 1e-6)
    k_rope = turned(down[..., sizes.kv_lora_rank :], positions, rope.theta, rope.interleave)
    q_rope = turned(q_rope, positions, rope.theta, rope.interleave)
    k_nope = np.einsum("bkc,hnc->bkhn", latent, p["up_key"])
    value = np.einsum("bkc,hcv->bkhv", latent, p["up_value"])
    scores = np.einsum("bqhn,bkhn->bhqk", q_nope, k_nope)
    scores = scores + np.einsum("bqhr,bkr->bhqk", q_rope, k_rope.conj()).real
    weights = softmax(scores * sizes.qk_dim**-0.5, causal(x.shape[1]))
    heads = np.einsum("bhqk,bkhv->bqhv", weights, value)
    return linear(heads.reshape(*x.shape[:2], -1), p["out"]), latent, k_rope


def _empty(config, requests, kind="float32") -> LatentCache:
    sizes = config.attention
    latent = jnp.zeros((requests, ROOM, sizes.kv_lora_rank))
    return LatentCache.of(latent, jnp.zeros((requests, ROOM, sizes.qk_rope_dim)), kind)


@pytest.mark.parametrize("name", CASES)
def test_prefill_is_multi_head_attention_over_keys_and_values_expanded_from_the_latent(name):
    module, x = _module(CASES[name]), _x()
    got, cache = module.prefill(jnp.asarray(x), "float32")
    want, latent, k_rope = _expanded(module, x)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    # the cache holds the latent and the shared key, first members of all pairs first
    np.testing.assert_allclose(cache.latent, latent, atol=TOLERANCE)
    both = np.concatenate([k_rope.real, k_rope.imag], axis=-1)
    np.testing.assert_allclose(cache.rope, both, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_decoding_in_absorbed_form_equals_the_expanded_equations(name):
    module, x = _module(CASES[name]), _x()
    want, _, _ = _expanded(module, x)
    cache, done = _empty(module.config, len(x)), 0
    for new in (3, 1, 3):
        lengths = jnp.full((len(x),), done, jnp.int32)
        got, cache = module.begin_decode(jnp.asarray(x[:, done : done + new]), cache, lengths)()
        np.testing.assert_allclose(got, want[:, done : done + new], atol=TOLERANCE)
        done += new


def test_requests_of_different_lengths_each_attend_their_own_cache():
    module, x = _module(tiny()), _x()
    want, _, _ = _expanded(module, x)
    _, whole = module.prefill(jnp.asarray(x), "float32")  # entries beyond a length are rubbish
    lengths = np.array([2, 5], np.int32)
    attend = module.begin_decode(
        jnp.asarray(x[[0, 1], lengths][:, None]), whole, jnp.asarray(lengths)
    )
    got, _ = attend()
    np.testing.assert_allclose(got[:, 0], want[[0, 1], lengths], atol=TOLERANCE)


def test_an_int8_cache_holds_every_latent_to_half_a_step():
    module, x = _module(tiny()), _x()
    _, latent, _ = _expanded(module, x)
    _, cache = module.prefill(jnp.asarray(x), "int8")
    step = np.abs(latent).max(-1, keepdims=True) / 127
    assert cache.latent.dtype == jnp.int8
    assert (np.abs(cache.read(jnp.float32) - latent) <= step / 2 + TOLERANCE).all()
    lengths = jnp.full((len(x),), TOKENS - 1, jnp.int32)
    exact, _ = module.begin_decode(jnp.asarray(x[:, -1:]), cache, lengths)()
    want, _, _ = _expanded(module, x)
    # bfloat16 queries, eight bits each of 16 latent channels: a hundredth of outputs of size one
    np.testing.assert_allclose(exact[:, 0], want[:, -1], atol=0.05)


def test_yarn_sharpens_the_scores_by_its_temperature_squared():
    scaled = YarnConfig(factor=1.0, original_max_position=256, mscale_all_dim=1.0)
    plain, stretched = tiny(), dataclasses.replace(tiny(), rope=Rope(scaling=scaled))
    x = jnp.asarray(_x())
    same = _module(stretched).prefill(x, "float32")[0]  # a factor of one changes nothing
    np.testing.assert_array_equal(same, _module(plain).prefill(x, "float32")[0])
    sharper = dataclasses.replace(scaled, factor=8.0)
    module = _module(dataclasses.replace(tiny(), rope=Rope(scaling=sharper)))
    got = module.prefill(x[:, :1], "float32")[0]  # position 0 is not turned, one key: no softmax
    np.testing.assert_allclose(got, _module(plain).prefill(x[:, :1], "float32")[0], atol=TOLERANCE)
