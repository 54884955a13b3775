"""Grouped-query attention against its equations in float64, and its cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import causal, inputs, linear, randomized, rms_norm, softmax, turned
from flax import nnx

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.models.moe.layers.cache import GroupedCache
from cmjax.models.moe.layers.gqa import GQA
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.positions import Rope
from cmjax.models.moe.presets import tiny
from cmjax.models.moe.slots import ep_table

TOKENS, ROOM = 7, 9
TOLERANCE = 2e-5  # float32 rounding of sums of up to 128 terms of size one
HALVES = Rope(interleave=False)


def _config(rope: Rope = HALVES, **attention) -> MoEConfig:
    sizes = GroupedAttention(**{"kv_heads": 2, "head_dim": 16, **attention})
    return dataclasses.replace(tiny(), attention=sizes, rope=rope)


CASES = {
    "Mixtral": _config(),
    "Qwen3": _config(qk_norm=True),
    "biases": _config(bias=True, out_bias=True),
    "GLM-4.5": _config(Rope(interleave=False, fraction=0.5), qk_norm=True, bias=True),
    "neighbouring pairs of a quarter": _config(Rope(fraction=0.25)),
    "window of 3": _config(window=3),
    "one key head": _config(kv_heads=1),
    "neighbouring pairs": _config(rope=Rope(theta=500.0)),
}


@functools.cache
def _module(config: MoEConfig) -> GQA:
    arithmetic, rngs = Arithmetic.of("float32"), nnx.Rngs(params=0)
    return randomized(GQA(config, one_rank(config), arithmetic=arithmetic, rngs=rngs))


def _x(sequences=2):
    return inputs(sequences, TOKENS, tiny().hidden_size)


def _repeated_heads(module: GQA, x):
    """(output, keys, values): multi-head attention in which query head h reads key and value head
    h * kv_heads // heads. Of a key: first members of all pairs, then second ones, then the rest."""
    config, sizes = module.config, module.config.attention
    assert isinstance(sizes, GroupedAttention)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(module)))
    h = rms_norm(x.astype(np.float64), p["norm"]["gain"], config.norm_eps)
    heads, groups = config.heads, sizes.kv_heads
    q, k, v = np.split(
        linear(h, p["qkv"]).reshape(*x.shape[:2], -1, sizes.head_dim),
        (heads, heads + groups),
        axis=2,
    )
    if sizes.qk_norm:
        q, k = (rms_norm(y, p[f"{n}_norm"], config.norm_eps) for n, y in (("q", q), ("k", k)))
    positions, rope = np.arange(x.shape[1]), config.rope
    width = int(sizes.head_dim * rope.fraction)
    rests = [y[..., width:] for y in (q, k)]
    q, k = (turned(y[..., :width], positions, rope.theta, rope.interleave) for y in (q, k))
    each = [head * groups // heads for head in range(heads)]
    scores = np.einsum("bqhd,bkhd->bhqk", q, k[:, :, each].conj()).real
    scores += np.einsum("bqhd,bkhd->bhqk", rests[0], rests[1][:, :, each])
    weights = softmax(scores * sizes.head_dim**-0.5, causal(x.shape[1], sizes.window))
    found = np.einsum("bhqk,bkhd->bqhd", weights, v[:, :, each])
    k = np.concatenate([k.real, k.imag, rests[1]], axis=-1)
    return linear(found.reshape(*x.shape[:2], -1), p["out"]), k, v


@pytest.mark.parametrize("name", CASES)
def test_prefill_is_multi_head_attention_with_repeated_heads(name):
    module, x = _module(CASES[name]), _x()
    got, cache = module.prefill(jnp.asarray(x), "float32")
    want, key, value = _repeated_heads(module, x)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    np.testing.assert_allclose(cache.key, key, atol=TOLERANCE)
    np.testing.assert_allclose(cache.value, value, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_decoding_on_the_cache_equals_the_equations(name):
    module, x = _module(CASES[name]), _x()
    want, _, _ = _repeated_heads(module, x)
    sizes = module.config.attention
    zeros = jnp.zeros((len(x), ROOM, sizes.kv_heads, sizes.head_dim))
    cache, done = GroupedCache.of(zeros, zeros, "float32"), 0
    for new in (3, 1, 3):
        lengths = jnp.full((len(x),), done, jnp.int32)
        got, cache = module.begin_decode(jnp.asarray(x[:, done : done + new]), cache, lengths)()
        np.testing.assert_allclose(got, want[:, done : done + new], atol=TOLERANCE)
        done += new


def test_requests_of_different_lengths_each_attend_their_own_cache():
    module, x = _module(CASES["window of 3"]), _x()
    want, _, _ = _repeated_heads(module, x)
    _, whole = module.prefill(jnp.asarray(x), "float32")  # entries beyond a length are rubbish
    lengths = np.array([2, 5], np.int32)
    attend = module.begin_decode(
        jnp.asarray(x[[0, 1], lengths][:, None]), whole, jnp.asarray(lengths)
    )
    got, _ = attend()
    np.testing.assert_allclose(got[:, 0], want[[0, 1], lengths], atol=TOLERANCE)


def test_as_many_key_heads_as_heads_with_repeated_columns_give_the_same():
    few, many = _module(_config()), _module(_config(kv_heads=8))  # nobody else uses the second
    columns = np.asarray(few.qkv.weight).reshape(64, -1, 16)
    q, k, v = np.split(columns, (8, 10), axis=1)
    repeated = np.concatenate([q, np.repeat(k, 4, 1), np.repeat(v, 4, 1)], axis=1)
    assert many.qkv.weight is not None
    many.qkv.weight[...] = jnp.asarray(repeated.reshape(64, -1))
    many.out, many.norm = few.out, few.norm
    x = jnp.asarray(_x())
    got, want = (module.prefill(x, "float32")[0] for module in (many, few))
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_a_token_further_back_than_the_window_does_not_matter():
    module, x = _module(CASES["window of 3"]), _x()
    other = x.copy()
    other[:, 0] += 1
    got, want = (module.prefill(jnp.asarray(y), "float32")[0] for y in (other, x))
    np.testing.assert_array_equal(got[:, 3:], want[:, 3:])
    assert (np.abs(got[:, :3] - want[:, :3]).max(-1) > 1e-3).all()


@pytest.mark.parametrize(("kind", "half_step"), [("int8", 1 / 254), ("mxfp4", 1 / 4)])
def test_a_quantized_cache_holds_keys_and_values_to_half_a_step(kind, half_step):
    """Of the largest: 1/127 in INT8. MXFP4 has steps of up to 2 below 6, and its power-of-two scale
    may be just under twice what the largest needs, or clip it by a quarter."""
    module, x = _module(_config(head_dim=32)), _x()
    _, exact = module.prefill(jnp.asarray(x), "float32")
    _, cache = module.prefill(jnp.asarray(x), kind)
    for got, want in zip(cache.read(jnp.float32), (exact.key, exact.value), strict=True):
        largest = np.abs(want).max(-1, keepdims=True)
        assert (np.abs(got - want) <= half_step * largest + TOLERANCE).all()


def test_heads_are_not_split_over_ranks():
    parallelism = Parallelism(table=ep_table(16, 4), axes=("node",), sequence_parallel=True)
    with pytest.raises(ValueError, match="splits the heads of latent attention only"):
        GQA(_config(), parallelism, arithmetic=Arithmetic.of("float32"), rngs=nnx.Rngs(0))
