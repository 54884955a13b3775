"""Attention primitives against float64 NumPy, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

from cmjax.primitives.attention.cached import cached_attention
from cmjax.primitives.attention.exact import attention, latent_attention
from cmjax.program import trace


def _one_query(q, keys, values, scale):
    if len(keys) == 0:
        return np.zeros(values.shape[-1])
    scores = scale * keys @ q
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def _numpy(q, k, v, scale, causal, lengths, window=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, q_len, heads, _ = q.shape
    out = np.zeros((batch, q_len, heads, v.shape[-1]))
    for b, i, h in np.ndindex(batch, q_len, heads):
        exist = k.shape[1] if lengths is None else int(lengths[b])
        seen = min(exist, exist - q_len + i + 1) if causal else exist
        seen = max(seen, 0)
        first = 0 if window is None else max(exist - q_len + i + 1 - window, 0)
        group = h * k.shape[2] // heads
        keys, values = k[b, first:seen, group], v[b, first:seen, group]
        out[b, i, h] = _one_query(q[b, i, h], keys, values, scale)
    return out


def _qkv(kv_heads, q_len=3, kv_len=7, heads=4, d=8, dv=5, dtype=np.float32):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, q_len, heads, d)).astype(dtype)
    k = rng.normal(size=(2, kv_len, kv_heads, d)).astype(dtype)
    return q, k, rng.normal(size=(2, kv_len, kv_heads, dv)).astype(dtype)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, (3, 7), (1, 5), (0, 2)])
def test_attention_equals_numpy(kv_heads, causal, lengths):
    q, k, v = _qkv(kv_heads)
    given = None if lengths is None else jnp.array(lengths)
    got = attention(q, k, v, scale=0.3, causal=causal, lengths=given)
    np.testing.assert_allclose(got, _numpy(q, k, v, 0.3, causal, lengths), atol=2e-6)


@pytest.mark.parametrize("window", [1, 2, 5, 9])
@pytest.mark.parametrize("lengths", [None, (3, 7), (1, 5)])
def test_with_a_window_a_query_sees_only_the_newest_keys(window, lengths):
    q, k, v = _qkv(2)
    given = None if lengths is None else jnp.array(lengths)
    got = attention(q, k, v, scale=0.3, causal=True, lengths=given, window=window)
    np.testing.assert_allclose(got, _numpy(q, k, v, 0.3, True, lengths, window), atol=2e-6)


def _totals(keys, queries, kv_heads, window):
    """Work of causal attention of two heads of 8 over so many keys."""

    def run(q, k):
        return attention(q, k, k, scale=1.0, causal=True, window=window)

    q, k = jnp.ones((1, queries, 2, 8)), jnp.ones((1, keys, kv_heads, 8))
    return trace(run, q, k).totals({})


def test_a_window_prices_the_scores_it_lets_through():
    def flops(keys, queries, window):
        return _totals(keys, queries, 2, window)["flops"]

    each = 2 * 2.0 * (8 + 8)  # two heads, multiply-adds of scores and values
    assert flops(64, 1, 16) == pytest.approx(each * 16, rel=0.01)
    assert flops(64, 64, 64) == flops(64, 64, None)
    seen = sum(min(i + 1, 16) for i in range(64))
    assert flops(64, 64, 16) == pytest.approx(each * seen, rel=0.02)


def test_keys_behind_the_window_are_not_read():
    def read(keys, queries, window):
        return _totals(keys, queries, 1, window)["read_bytes"]

    query, entry = 2 * 8 * 4, 2 * 8 * 4
    assert read(64, 1, 16) == query + 16 * entry
    assert read(64, 3, 16) == 3 * query + 18 * entry  # the first query's oldest is two before
    assert read(64, 1, None) == read(64, 1, 99) == query + 64 * entry
    assert read(64, 64, 16) == 64 * query + 64 * entry


def test_a_cache_in_int8_is_read_as_it_lies():
    requests, keys, heads, dim = 3, 64, 2, 8
    q = jnp.ones((requests, 1, 4, dim), jnp.bfloat16)
    steps = jnp.ones((requests, keys, heads, dim), jnp.int8)
    step, lengths = jnp.ones((requests, keys, heads)), jnp.full(requests, keys, jnp.int32)

    def run(q, k, k_scale, v, v_scale, lengths):
        return cached_attention(q, k, k_scale, v, v_scale, lengths, scale=1.0)

    found = trace(run, q, steps, step, steps, step, lengths).totals({})
    cache = 2 * (requests * keys * heads * (dim + 4))  # a byte each, and a float32 per token
    # besides, every request's length
    assert found["read_bytes"] == cache + 2 * q.size + 4 * requests
    assert found["write_bytes"] == 2 * q.size
    assert found["launches"] == 1


def test_a_query_that_sees_nothing_gets_zeros_and_a_finite_gradient():
    q, k, v = _qkv(4)

    def total(q, k, v):
        return attention(q, k, v, scale=1.0, causal=True, lengths=jnp.array([0, 1])).sum()

    out = attention(q, k, v, scale=1.0, causal=True, lengths=jnp.array([0, 1]))
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(out[1, :2], 0)
    assert np.abs(out[1, 2]).max() > 0
    assert all(np.isfinite(g).all() for g in jax.grad(total, (0, 1, 2))(q, k, v))


def test_softmax_is_float32_for_bfloat16_operands():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in _qkv(2, kv_len=64))
    got = attention(q, k, v, scale=0.3, causal=False)
    assert got.dtype == jnp.bfloat16
    want = _numpy(q, k, v, 0.3, False, None)
    # weights and the result are rounded to 8 bits once each
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2 * 2.0**-8)


def test_derivatives_agree_with_differences_and_vmap_maps():
    q, k, v = _qkv(2)
    lengths = jnp.array([5, 7])

    def fn(q, k, v):
        return attention(q, k, v, scale=0.3, causal=True, lengths=lengths)

    check_grads(fn, (q, k, v), order=1, modes=["fwd", "rev"], atol=1e-2, rtol=1e-2)
    many = [np.stack([x, 2 * x]) for x in (q, k, v)]
    got = jax.vmap(fn)(*many)
    np.testing.assert_allclose(got[1], fn(2 * q, 2 * k, 2 * v), atol=1e-6)


@pytest.mark.parametrize("lengths", [(3, 9), (2, 6)])
@pytest.mark.parametrize("quantized", [False, True])
def test_latent_attention_equals_numpy(lengths, quantized):
    rng = np.random.default_rng(0)
    q_latent, q_rope = rng.normal(size=(2, 2, 3, 4, 6)).astype(np.float32)
    q_rope = q_rope[..., :2]
    rope = rng.normal(size=(2, 9, 2)).astype(np.float32)
    if quantized:
        latent = rng.integers(-127, 128, size=(2, 9, 6)).astype(np.int8)
        scale = rng.uniform(0.005, 0.02, size=(2, 9)).astype(np.float32)
        value = latent * scale[..., None].astype(np.float64)
    else:
        latent, scale = rng.normal(size=(2, 9, 6)).astype(np.float32), None
        value = latent
    got = latent_attention(q_latent, q_rope, latent, scale, rope, jnp.array(lengths), scale=0.2)
    q = np.concatenate([q_latent, q_rope], -1)
    k = np.concatenate([value, rope], -1)[:, :, None]
    want = _numpy(q, k, np.asarray(value)[:, :, None], 0.2, True, lengths)
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_sizes_may_be_symbolic_and_each_kernel_is_one_equation():
    b, n = export.symbolic_shape("b, n")

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    q, k, v = shape(b, 2, 8, 16), shape(b, n, 2, 16), shape(b, n, 2, 12)
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
    jaxpr = jax.make_jaxpr(
        lambda q, k, v, lengths: attention(q, k, v, scale=1, causal=True, lengths=lengths)
    )(q, k, v, lengths)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["cm_attention"]
    assert jaxpr.eqns[0].params == {"scale": 1.0, "causal": True, "window": None}
    assert jaxpr.out_avals[0].shape == (b, 2, 8, 12)
    prompt = jax.eval_shape(
        lambda q, k: attention(q, k, k, scale=1, causal=True), shape(b, n, 8, 16), k
    )
    assert prompt.shape == (b, n, 8, 16)


def _latents(**changes):
    arguments = {
        "q_latent": jnp.ones((1, 1, 2, 4)),
        "q_rope": jnp.ones((1, 1, 2, 2)),
        "latent": jnp.ones((1, 3, 4)),
        "latent_scale": None,
        "rope": jnp.ones((1, 3, 2)),
        "lengths": jnp.ones((1,), int),
    } | changes
    return latent_attention(**arguments, scale=1.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: attention(*_qkv(3), scale=1, causal=True), "4 query heads and 3 key heads"),
        (
            lambda: attention(jnp.ones((1, 2, 3)), *_qkv(1)[1:], scale=1, causal=True),
            r"q must be \[batch, length, heads, d\], got \(1, 2, 3\)",
        ),
        (
            lambda: attention(_qkv(1, d=6)[0], *_qkv(1)[1:], scale=1, causal=True),
            "q and k must agree in d",
        ),
        (
            lambda: attention(*_qkv(1), scale=1, causal=True, window=0),
            "window must be at least 1 key .* got window=0",
        ),
        (lambda: attention(*_qkv(1), scale=1, causal=False, window=2), "needs causal=True"),
        (lambda: _latents(latent=jnp.ones((1, 3, 4), jnp.int8)), "int8 latent needs latent_scale"),
        (lambda: _latents(latent_scale=jnp.ones((1, 3))), "must not have it"),
        (lambda: _latents(latent=jnp.ones((1, 3, 5))), "last axes of q_latent and latent"),
        (lambda: _latents(rope=jnp.ones((1, 4, 2))), "must agree in all but the last axis"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_backward_pass_keeps_one_array_of_the_size_of_the_scores(dtype):
    """The weights, in the dtype of the values."""
    q, k, v = (jax.ShapeDtypeStruct((2, 24, heads, 8), dtype) for heads in (4, 2, 2))

    def kept(q, k, v):
        run = functools.partial(attention, scale=0.5, causal=True)
        return jax.tree.leaves(jax.vjp(run, q, k, v)[1])

    found = [x for x in jax.eval_shape(kept, q, k, v) if x.size >= 2 * 4 * 24 * 24]
    assert [(x.size, x.dtype) for x in found] == [(2 * 4 * 24 * 24, dtype)]
