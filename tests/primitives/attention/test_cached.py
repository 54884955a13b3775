"""Attention of new tokens over a cache: kernel and XLA alike, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives.attention.exact import attention


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
    lengths = np.array([queries, 7, 23, 2, 23], np.int32)
    q = jnp.asarray(rng.normal(size=(5, queries, 6, dim)), dtype)
    k = jnp.asarray(rng.normal(size=(5, 23, 2, dim)), dtype)
    v = jnp.asarray(rng.normal(size=(5, 23, 2, value_dim)), dtype)
    scale = dim**-0.5
    fn = jax.jit(
        lambda *a: attention(*a[:3], scale=scale, causal=True, lengths=a[3], window=window)
    )
    wanted = _wanted(q, k, v, lengths, scale, window)
    np.testing.assert_allclose(fn(q, k, v, lengths), wanted, rtol=error, atol=error)
    mapped = jax.vmap(fn)(q[None], k[None], v[None], lengths[None])
    np.testing.assert_array_equal(mapped[0], fn(q, k, v, lengths))


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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_what_is_behind_the_length_never_matters_and_what_is_seen_does(bad, which):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 8)), jnp.float32) for n in (1, 9, 9))
    operands, lengths = {"q": q, "k": k, "v": v}, jnp.array([4, 4])
    fn = jax.jit(lambda q, k, v: attention(q, k, v, scale=0.3, causal=True, lengths=lengths))
    behind = operands | {which: operands[which].at[:, 4:].set(bad)}
    np.testing.assert_array_equal(fn(**behind), fn(**operands))
    seen = fn(**operands | {which: operands[which].at[0, 2, 1].set(bad)})
    assert np.isnan(seen[0, :, 1]).all() and np.isfinite(seen[1]).all()
    np.testing.assert_array_equal(seen[0, :, 0], fn(**operands)[0, :, 0])
