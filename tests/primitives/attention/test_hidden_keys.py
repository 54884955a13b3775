"""What is hidden does not matter, whatever it holds: in every attention, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives import (
    attention,
    flash_attention,
    latent_attention,
    msd_attention,
    pasa_attention,
    quantize_kv,
)

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, D = 2, 6, 150, 4, 2, 64
LENGTHS = np.array([70, 133], np.int32)
USED = np.arange(KEYS) < LENGTHS[:, None]
MASK = USED[:, None, None]
CACHES = [("int8", "token"), ("int8", "channel"), ("mxfp4", "token")]
RUBBISH = [0.0, 1e4, 6e4, -3e38, np.nan, np.inf, -np.inf]


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (BATCH, QUERIES, HEADS, D), (BATCH, KEYS, KV_HEADS, D), (BATCH, KEYS, KV_HEADS, D)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def holding(x, value):
    """`x` with a value in the unused entries."""
    return np.where(USED.reshape(*USED.shape, *[1] * (x.ndim - 2)), x, np.float32(value))


def dense(q, k, v):
    """Float64 attention over the used keys, row by row."""
    out = np.zeros((BATCH, QUERIES, HEADS, D))
    for b, h in np.ndindex(BATCH, HEADS):
        seen = USED[b]
        scores = D**-0.5 * q[b, :, h].astype(float) @ k[b, seen, h // 2].astype(float).T
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, :, h] = weights @ v[b, seen, h // 2] / weights.sum(-1, keepdims=True)
    return out


ATTENTIONS = {
    "pasa": (lambda *x: pasa_attention(*x, mask=MASK), 5e-3),
    "pasa, by means": (lambda *x: pasa_attention(*x, mask=MASK, shift="mean"), 5e-3),
    "pasa, by products": (lambda *x: pasa_attention(*x, mask=MASK, shift="gemm"), 5e-3),
    "pasa, as published": (lambda *x: pasa_attention(*x, mask=MASK, statistics="storage"), 5e-3),
    "pasa, exact": (lambda *x: pasa_attention(*x, mask=MASK, statistics="exact_offset"), 5e-3),
    "pasa, capped": (lambda *x: pasa_attention(*x, mask=MASK, softcap=1e3), 5e-3),
    "flash": (lambda *x: flash_attention(*x, mask=MASK), 2e-3),
    "flash, by a bias": (
        lambda *x: flash_attention(*x, bias=jnp.where(MASK, 0.0, -jnp.inf)),
        2e-3,
    ),
    "exact": (
        lambda *x: attention(*x, scale=D**-0.5, causal=False, lengths=jnp.asarray(LENGTHS)),
        1e-5,
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_and_gradients_are_those_of_zeros_in_unused_entries(name):
    fn, error = ATTENTIONS[name]
    q, k, v = draw()
    want = dense(q, k, v)

    @jax.jit
    def both(q, k, v):
        return fn(q, k, v), jax.grad(lambda *x: (fn(*x) ** 2).sum(), (0, 1, 2))(q, k, v)

    clean = both(q, holding(k, 0), holding(v, 0))
    assert np.abs(clean[0] - want).max() <= error * np.abs(want).max()
    for value in RUBBISH:
        got = both(q, holding(k, value), holding(v, value))
        jax.tree.map(np.testing.assert_array_equal, got, clean)


@pytest.mark.parametrize("name", ["pasa", "flash", "exact"])
@pytest.mark.parametrize("operand", ["k", "v"])
def test_a_later_key_that_is_nan_reaches_the_queries_that_see_it_alone(name, operand):
    fn = {
        "pasa": lambda *x: pasa_attention(*x, causal=True),
        "flash": lambda *x: flash_attention(*x, causal=True),
        "exact": lambda *x: attention(*x, scale=0.1, causal=True),
    }[name]
    rng = np.random.default_rng(0)
    q = rng.normal(size=(BATCH, KEYS, HEADS, D)).astype(np.float32)
    _, k, v = draw()
    clean = np.asarray(fn(q, k, v))
    operands = {"k": k.copy(), "v": v.copy()}
    operands[operand][0, 90, 1, 3] = np.nan
    got = np.asarray(fn(q, operands["k"], operands["v"]))
    reached = np.zeros_like(got, bool)
    reached[0, 90:, 2:] = True
    np.testing.assert_array_equal(np.isnan(got), reached)
    np.testing.assert_allclose(got[~reached], clean[~reached], atol=4e-3 if name == "pasa" else 0)


def test_pasa_shifts_by_the_mean_of_the_keys_in_use():
    """One key in use of a block of 128, with a bias whose scores float16 could not hold."""
    rng = np.random.default_rng(0)
    q = 60 + rng.normal(size=(1, 2, 1, 128)).astype(np.float32)
    k = 60 + rng.normal(size=(1, 128, 1, 128)).astype(np.float32)
    v = rng.normal(size=(1, 128, 1, 128)).astype(np.float32)
    for used in (1, 3, 100):
        mask = (np.arange(128) < used)[None, None, None]
        options = {"mask": mask, "scale": 1.0, "statistics": "exact_offset"}
        got = pasa_attention(q, k, v, **options)
        scores = np.einsum("bqhd,bkhd->bhqk", q.astype(float), k[:, :used].astype(float))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        want = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v[:, :used])
        assert np.abs(got - want).max() < 0.05


def test_a_latent_cache_may_hold_anything_beyond_its_lengths():
    rng = np.random.default_rng(0)
    shapes = (BATCH, 1, HEADS, 16), (BATCH, 1, HEADS, 8), (BATCH, KEYS, 16), (BATCH, KEYS, 8)
    q_latent, q_rope, latent, rope = (rng.normal(size=s).astype(np.float32) for s in shapes)
    lengths = jnp.asarray(LENGTHS)

    def fn(latent, rope, scale=None):
        return latent_attention(q_latent, q_rope, latent, scale, rope, lengths, scale=0.2)

    def gradient(latent, rope):
        return jax.grad(lambda *x: (fn(*x) ** 2).sum(), (0, 1))(latent, rope)

    zeros = holding(latent, 0), holding(rope, 0)
    steps, size = rng.integers(-127, 128, latent.shape).astype(np.int8), np.ones((BATCH, KEYS))
    size = size.astype(np.float32)
    for value in RUBBISH:
        wrong = holding(latent, value), holding(rope, value)
        np.testing.assert_array_equal(fn(*wrong), fn(*zeros))
        jax.tree.map(np.testing.assert_array_equal, gradient(*wrong), gradient(*zeros))
        quantized = fn(steps, wrong[1], holding(size, value))
        np.testing.assert_array_equal(quantized, fn(steps, zeros[1], size))


@pytest.mark.parametrize("how", ["lengths", "causal", "mask", "bias"])
@pytest.mark.parametrize(
    "format, per", [("int8", "token"), ("int8", "channel"), ("mxfp4", "token")]
)
def test_a_few_bit_cache_may_hold_any_steps_and_scales_in_unused_entries(format, per, how):
    rng = np.random.default_rng(0)
    keys, used = 96, 40
    q = rng.normal(size=(2, 3, 4, 32)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, keys, 2, 32)).astype(np.float32)
    cache = quantize_kv(k, v, format=format, per=per)
    seen = np.arange(keys) < used
    options = {
        "lengths": {"lengths": jnp.array([used, used])},
        "causal": {"lengths": jnp.array([used, used]), "causal": True, "window": 20},
        "mask": {"mask": seen[None, None, None]},
        "bias": {"bias": np.where(seen, 0, -np.inf).astype(np.float32)[None, None, None]},
    }[how]
    options = {"causal": False, "scale": 0.2, "format": format} | options

    def fn(k, v, k_scale, v_scale):
        return msd_attention(q, k, v, k_scale=k_scale, v_scale=v_scale, **options)

    want = fn(cache.k, cache.v, cache.k_scale, cache.v_scale)

    def spoilt(scale, value):
        scale = np.array(scale)
        if scale.shape[1] > 1:
            scale[:, -(-used // (keys // scale.shape[1])) :] = value
        return jnp.asarray(scale)

    steps = [np.array(x) for x in (cache.k, cache.v)]
    for x in steps:
        x[:, used:] = 127
    for value in [0, 255] if format == "mxfp4" else RUBBISH:
        scales = (spoilt(scale, value) for scale in (cache.k_scale, cache.v_scale))
        operands = (*map(jnp.asarray, steps), *scales)
        np.testing.assert_array_equal(fn(*operands), want)
        np.testing.assert_allclose(jax.jit(fn)(*operands), want, rtol=1e-6, atol=1e-7)


def test_a_scale_in_use_that_is_none_is_refused_or_turns_what_sees_it_into_nan():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 8, 2, 32)).astype(np.float32)
    cache = quantize_kv(*rng.normal(size=(2, 1, 8, 2, 32)).astype(np.float32))
    broken = cache.v_scale.at[0, 5, 1, 0].set(jnp.nan)

    def fn(v_scale):
        return msd_attention(
            q, cache.k, cache.v, k_scale=cache.k_scale, v_scale=v_scale, scale=0.2, causal=True
        )

    with pytest.raises(ValueError, match=r"every v_scale must .* where it is in use, 1 of"):
        fn(broken)
    got, clean = jax.jit(fn)(broken), fn(cache.v_scale)
    reached = np.zeros(got.shape, bool)
    reached[0, 5:, 1] = True
    np.testing.assert_array_equal(np.isnan(got), reached)
    np.testing.assert_array_equal(np.asarray(got)[~reached], np.asarray(clean)[~reached])
