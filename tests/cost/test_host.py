"""Prices by NumPy are prices by XLA."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.cost.host import on_host

X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
FUNCTIONS = {
    "arithmetic": lambda x: (jnp.exp(-x) + x**3 / 2 - jnp.sqrt(jnp.abs(x))) * jnp.minimum(x, 1.0),
    "where": lambda x: jnp.where((x > 0) & (x < 1), x, jnp.maximum(x, -1)),
    "reductions": lambda x: (x.max(0), x.min((0, 2)), x.sum(-1), x.mean(), jnp.any(x > 2)),
    "shapes": lambda x: jnp.concatenate([x[:, 1:3].reshape(6, 5), x[1, ::2], x[2][None, 1]]),
    "turns": lambda x: x.T[None, 2:4, ::-1],
    "stack": lambda x: jnp.stack([x[0], x[1] * 2], axis=1),
    "row by number": lambda x: x[jnp.array([2, 0]), :, jnp.array([1, 1])],
    "dynamic rows": lambda x: jax.vmap(lambda a, i: a[i])(x, jnp.array([3, 9, 0])),
    "products": lambda x: (jnp.tensordot(x, x, ([1], [1])), jnp.einsum("bij,bkj->bik", x, x)),
    "iota": lambda x: x * jnp.arange(5.0) + jax.lax.broadcasted_iota(jnp.float32, (3, 4, 5), 1),
    "inner jit": lambda x: jax.jit(lambda y: y * 2)(x) + 1,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_those_of_xla(name):
    found, expected = on_host(FUNCTIONS[name])(X), jax.jit(FUNCTIONS[name])(X)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, np.ndarray | np.generic), "XLA ran"
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


def test_what_is_not_array_arithmetic_is_run_by_xla():
    found = on_host(lambda x: jax.lax.cumsum(x, axis=1))(X)
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found, np.cumsum(X, 1), rtol=1e-5, atol=1e-6)


def test_gradients_and_batches_go_through():
    host = on_host(lambda x: jnp.sum(x**2))
    np.testing.assert_allclose(jax.grad(host)(X), 2 * X, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(host)(X), (X**2).sum((1, 2)), rtol=1e-5)


def test_a_function_is_traced_once_a_shape():
    traces = []

    @on_host
    def host(x):
        traces.append(x.shape)
        return x + 1

    for x in (X, X, X[0], X[0]):
        host(x)
    assert traces == [(3, 4, 5), (4, 5)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_function_does_can_be_kept_and_run_without_it(name):
    files = {}

    def keep(key, make):
        files.setdefault(repr(key), pickle.dumps(make() if repr(key) not in files else None))
        return pickle.loads(files[repr(key)])

    def gone(x):
        raise AssertionError("traced again")

    expected = on_host(FUNCTIONS[name], keep)(X)
    found = on_host(gone, keep)(X)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    (content,) = files.values()
    assert not re.search(rb"(?<!cm)jax", content)  # a reader makes only what is known to it
