"""Causal attention of prompts, over caches and latents: kernel and XLA against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import native
from cmjax.primitives.attention.cached import cached_attention
from cmjax.primitives.attention.exact import attention, latent_attention
from cmjax.program import fused, trace


def _wanted(q, k, v, lengths, scale, window):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, queries, heads, _ = q.shape
    group = heads // k.shape[2]
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for b in range(batch):
        for i in range(queries):
            at = lengths[b] - queries + i
            seen = [t for t in range(min(at + 1, k.shape[1])) if window is None or t > at - window]
            if not seen:
                continue
            for h in range(heads):
                scores = scale * k[b, seen, h // group] @ q[b, i, h]
                mass = np.exp(scores - scores.max())
                y[b, i, h] = mass / mass.sum() @ v[b, seen, h // group]
    return y


@pytest.mark.parametrize("dtype, error", [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("queries, dim, value_dim", [(1, 64, 64), (2, 20, 33), (5, 16, 8)])
def test_new_tokens_attend_the_cache(dtype, error, window, queries, dim, value_dim):
    rng = np.random.default_rng(0)
    lengths = np.array([queries, 7, 23, 2, 23, 0, 30], np.int32)  # nothing there; more than room
    q = jnp.asarray(rng.normal(size=(7, queries, 6, dim)), dtype)
    k = jnp.asarray(rng.normal(size=(7, 23, 2, dim)), dtype)
    v = jnp.asarray(rng.normal(size=(7, 23, 2, value_dim)), dtype)
    scale = dim**-0.5
    fn = jax.jit(
        lambda *a: attention(*a[:3], scale=scale, causal=True, lengths=a[3], window=window)
    )
    wanted = _wanted(q, k, v, lengths, scale, window)
    np.testing.assert_allclose(fn(q, k, v, lengths), wanted, rtol=error, atol=error)
    mapped = jax.vmap(fn)(q[None], k[None], v[None], lengths[None])
    np.testing.assert_array_equal(mapped[0], fn(q, k, v, lengths))


@pytest.mark.parametrize("dtype, error", [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("heads, kv_heads, dim, value_dim", [(4, 1, 64, 64), (2, 2, 24, 40)])
def test_prompts_attend_themselves(dtype, error, window, heads, kv_heads, dim, value_dim):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 150, heads, dim)), dtype)
    k = jnp.asarray(rng.normal(size=(2, 150, kv_heads, dim)), dtype)
    v = jnp.asarray(rng.normal(size=(2, 150, kv_heads, value_dim)), dtype)
    fn = jax.jit(lambda *a: attention(*a, scale=dim**-0.5, causal=True, window=window))
    wanted = _wanted(q, k, v, [150, 150], dim**-0.5, window)
    np.testing.assert_allclose(fn(q, k, v), wanted, rtol=error, atol=error)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype, kept", [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "int8")])
def test_absorbed_queries_attend_the_latents(queries, dtype, kept):
    rng = np.random.default_rng(0)
    lengths = np.array([queries, 70, 90], np.int32)
    q_latent, q_rope, latent, rope = (
        jnp.asarray(rng.normal(size=(3, *shape)), dtype)
        for shape in ((queries, 5, 40), (queries, 5, 8), (90, 40), (90, 8))
    )
    steps = None
    if kept == "int8":
        latent = jnp.asarray(rng.integers(-127, 128, latent.shape), jnp.int8)
        steps = jnp.asarray(rng.uniform(0.01, 0.02, (3, 90)), jnp.float32)
    fn = jax.jit(lambda q, r, *kept: latent_attention(q, r, *kept, scale=0.2))
    found = fn(q_latent, q_rope, latent, steps, rope, lengths)
    values = np.asarray(latent, np.float64) * (1 if steps is None else np.asarray(steps)[..., None])
    key = np.concatenate([values, np.asarray(rope, np.float64)], -1)[:, :, None]
    query = np.concatenate([np.asarray(x, np.float64) for x in (q_latent, q_rope)], -1)
    wanted = _wanted(query, key, values[:, :, None], lengths, 0.2, None)
    error = 2e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(found, wanted, rtol=error, atol=error)


def _int8_cache(rng, tokens, value_dim=20):
    """Keys, values and their steps, and both as numbers."""
    k, v = (
        jnp.asarray(rng.integers(-127, 128, (3, tokens, 2, dim)), jnp.int8)
        for dim in (16, value_dim)
    )
    k_step, v_step = (
        jnp.asarray(rng.uniform(0.005, 0.03, (3, tokens, 2)), jnp.float32) for _ in range(2)
    )
    values = [
        np.asarray(x, np.float64) * np.asarray(s)[..., None] for x, s in ((k, k_step), (v, v_step))
    ]
    return (k, k_step, v, v_step), values


def _attend(q, cache, lengths, **options):
    k, k_step, v, v_step = cache
    return cached_attention(q, k, k_step, v, v_step, lengths, **options)


@pytest.mark.parametrize("dtype, error", [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("queries", [1, 3])
def test_new_tokens_attend_an_int8_cache(dtype, error, window, queries):
    rng = np.random.default_rng(0)
    cache, values = _int8_cache(rng, 70)
    q = jnp.asarray(rng.normal(size=(3, queries, 6, 16)), dtype)
    lengths = np.array([queries, 33, 70], np.int32)
    fn = jax.jit(lambda q, *cache: _attend(q, cache, lengths, scale=0.3, window=window))
    found, wanted = fn(q, *cache), _wanted(q, values[0], values[1], lengths, 0.3, window)
    assert found.dtype == q.dtype
    np.testing.assert_allclose(found, wanted, rtol=error, atol=error)
    mapped = jax.vmap(fn)(q[None], *(x[None] for x in cache))
    np.testing.assert_array_equal(mapped[0], found)


def test_of_an_int8_cache_steps_that_are_seen_matter_and_hidden_ones_do_not():
    rng = np.random.default_rng(0)
    cache, _ = _int8_cache(rng, 9)
    q, lengths = jnp.asarray(rng.normal(size=(3, 1, 4, 16)), jnp.float32), jnp.array([6, 6, 6])
    fn = jax.jit(lambda *cache: _attend(q, cache, lengths, scale=0.3))
    whole = np.asarray(fn(*cache))
    for which in (1, 3):
        hidden = [x.at[:, 7].set(np.nan) if i == which else x for i, x in enumerate(cache)]
        np.testing.assert_array_equal(fn(*hidden), whole)
        lost = [x.at[0, 2, 1].set(np.nan) if i == which else x for i, x in enumerate(cache)]
        found = np.asarray(fn(*lost))
        assert np.isnan(found[0, :, 2:]).all()  # heads that share the key
        np.testing.assert_array_equal(found[0, :, :2], whole[0, :, :2])
        np.testing.assert_array_equal(found[1:], whole[1:])


def test_an_int8_cache_has_the_gradient_of_the_formula():
    rng = np.random.default_rng(0)
    (k, k_step, v, v_step), _ = _int8_cache(rng, 9)
    q, lengths = jnp.asarray(rng.normal(size=(3, 1, 4, 16)), jnp.float32), jnp.array([4, 9, 6])

    def loss(q, k_step, v_step):
        return jnp.sum(jnp.sin(cached_attention(q, k, k_step, v, v_step, lengths, scale=0.3)))

    def plain(q, k_step, v_step):
        keys, values = k * k_step[..., None], v * v_step[..., None]
        return jnp.sum(jnp.sin(attention(q, keys, values, scale=0.3, causal=True, lengths=lengths)))

    found, wanted = (jax.grad(f, (0, 1, 2))(q, k_step, v_step) for f in (loss, plain))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_int8_cache_is_priced_as_one_kernel_that_dequantizes_and_attends_it():
    rng = np.random.default_rng(0)
    cache, _ = _int8_cache(rng, 9)
    q, lengths = (
        jnp.asarray(rng.normal(size=(3, 1, 4, 16)), jnp.bfloat16),
        jnp.array([4, 9, 6], jnp.int32),
    )

    @fused("CachedAttention")
    def chip(q, k, k_step, v, v_step):
        keys, values = (
            (x.astype(jnp.float32) * s[..., None]).astype(q.dtype)
            for x, s in ((k, k_step), (v, v_step))
        )
        return attention(q, keys, values, scale=0.3, causal=True, lengths=lengths)

    here = lambda q, *cache: _attend(q, cache, lengths, scale=0.3)  # noqa: E731
    found, wanted = (trace(fn, q, *cache) for fn in (here, chip))
    works = [[operation.work for operation in program.operations] for program in (found, wanted)]
    assert works[0] == works[1]
    assert any(work.kind == "attention" for work in works[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": jnp.zeros((3, 9, 2, 20), jnp.float32)}, "v must be int8, got float32"),
        (
            {"k_scale": jnp.ones((3, 9))},
            r"k_scale must be float32\[3, 9, 2\], one per token and head",
        ),
        ({"v_scale": jnp.ones((3, 9, 2), jnp.bfloat16)}, "v_scale must be float32.*got bfloat16"),
        ({"q": jnp.zeros((3, 1, 5, 16))}, "heads must be a multiple of kv_heads, got 5"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(change, message):
    names = ("k", "k_scale", "v", "v_scale")
    cache, _ = _int8_cache(np.random.default_rng(0), 9)
    given = {"q": jnp.zeros((3, 1, 4, 16)), "lengths": jnp.array([4, 9, 6]), "scale": 1.0}
    given |= dict(zip(names, cache, strict=True)) | change
    with pytest.raises((ValueError, TypeError), match=message):
        cached_attention(**given)


@pytest.mark.skipif(not native.status().enabled, reason=native.status().reason)
def test_causal_attention_goes_through_the_kernel_and_other_does_not():
    def lowered(causal, lengths):
        q, k = (jnp.zeros(shape, jnp.float32) for shape in ((2, 3, 4, 8), (2, 9, 2, 8)))
        fn = lambda q: attention(q, k, k, scale=1.0, causal=causal, lengths=lengths)  # noqa: E731
        return jax.jit(fn).lower(q).as_text()

    assert "cmjax_attention" in lowered(True, None)
    assert "cmjax_attention" in lowered(True, jnp.array([4, 9]))
    assert "cmjax_attention" not in lowered(False, jnp.array([4, 9]))
    cache, _ = _int8_cache(np.random.default_rng(0), 9)
    fn = lambda q: _attend(q, cache, jnp.array([4, 9, 6]), scale=1.0)  # noqa: E731
    assert "cmjax_attention" in jax.jit(fn).lower(jnp.zeros((3, 1, 4, 16), jnp.float32)).as_text()


def test_the_gradient_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 8)), jnp.float32) for n in (1, 9, 9))
    lengths = jnp.array([4, 9])
    weights = jnp.asarray(rng.normal(size=(2, 1, 2, 8)), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(weights * attention(q, k, v, scale=0.3, causal=True, lengths=lengths))

    gradient = jax.grad(loss, (0, 1, 2))(q, k, v)
    step = 1e-3
    for which, (x, found) in enumerate(zip((q, k, v), gradient, strict=True)):
        way = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        near = [
            loss(*(a + s * step * way if i == which else a for i, a in enumerate((q, k, v))))
            for s in (1, -1)
        ]
        slope = (near[0] - near[1]) / (2 * step)
        np.testing.assert_allclose(jnp.sum(found * way), slope, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_what_is_hidden_never_matters_and_one_element_that_is_seen_does(bad, which, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, n, h, 8)), dtype) for n, h in ((1, 4), (9, 2), (9, 2))
    )
    operands, lengths = {"q": q, "k": k, "v": v}, jnp.array([6, 6])

    @jax.jit
    def fn(q, k, v):
        return attention(q, k, v, scale=0.3, causal=True, lengths=lengths, window=4)

    whole = fn(**operands)
    for at in (6, 8, 1):  # behind the length, the last of the buffer, older than the window
        hidden = operands | {which: operands[which].at[:, at, 1, 3].set(bad)}
        np.testing.assert_array_equal(fn(**hidden), whole)
    for at in (2, 5):
        seen = np.asarray(fn(**operands | {which: operands[which].at[0, at, 1, 3].set(bad)}))
        assert np.isnan(seen[0, :, 2:]).all()  # heads that share the key
        np.testing.assert_array_equal(seen[0, :, :2], whole[0, :, :2])
        np.testing.assert_array_equal(seen[1], whole[1])


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_of_a_prompt_only_what_comes_after_an_element_that_is_not_finite_is_lost(bad, which):
    rng = np.random.default_rng(0)
    operands = {
        name: jnp.asarray(rng.normal(size=(1, 100, heads, 8)), jnp.float32)
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    fn = jax.jit(lambda q, k, v: attention(q, k, v, scale=0.3, causal=True))
    whole = np.asarray(fn(**operands))
    found = np.asarray(fn(**operands | {which: operands[which].at[0, 70, 1, 3].set(bad)}))
    assert np.isnan(found[0, 70:, 2:]).all()
    np.testing.assert_array_equal(found[0, :, :2], whole[0, :, :2])
    np.testing.assert_allclose(found[0, :70], whole[0, :70], rtol=2e-6, atol=2e-6)


def test_a_score_that_leaves_float32_downwards_weighs_nothing_and_upwards_is_nan():
    k = jnp.zeros((2, 3, 1, 4)).at[0, 0].set(-3e38).at[1, 0].set(3e38)
    v = jnp.arange(1.0, 4).reshape(1, 3, 1, 1) * jnp.ones((2, 1, 1, 2))
    fn = jax.jit(lambda q: attention(q, k, v, scale=1.0, causal=True, lengths=jnp.array([3, 3])))
    got = np.asarray(fn(jnp.ones((2, 1, 1, 4))))
    np.testing.assert_allclose(got[0], 2.5)  # of 1, 2 and 3 the first is out
    assert np.isnan(got[1]).all()


def test_values_near_the_end_of_float32_overflow_in_their_own_column_only():
    q = k = jnp.zeros((1, 2, 1, 4))
    v = jnp.full((1, 2, 1, 3), 3e38).at[..., 2].set(1.0)
    fn = jax.jit(lambda q: attention(q, k, v, scale=1.0, causal=True, lengths=jnp.array([2])))
    np.testing.assert_allclose(fn(q[:, :1])[0, 0, 0], [3e38, 3e38, 1.0], rtol=1e-6)


def test_with_64_bit_types_on_the_kernel_gives_the_same_and_float64_is_attended_too():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, h, 8)) for n, h in ((1, 4), (9, 2), (9, 2)))
    narrow = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    options = {"scale": 0.3, "causal": True}
    before = jax.jit(lambda *a: attention(*a, **options, lengths=jnp.array([4, 9])))(*narrow)
    with jax.enable_x64(True):
        fn = jax.jit(lambda *a: attention(*a, **options, lengths=jnp.array([4, 9])))
        after = fn(*narrow)
        assert after.dtype == jnp.float32
        np.testing.assert_array_equal(after, before)
        wide = fn(*map(jnp.asarray, (q, k, v)))
        assert wide.dtype == jnp.float64
    wanted = _wanted(q, k, v, np.array([4, 9]), 0.3, None)
    np.testing.assert_allclose(before, wanted, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(wide, wanted, rtol=2e-6, atol=2e-6)  # its softmax is float32
