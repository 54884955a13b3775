"""What a layer keeps between its passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.parallelism.backward import Backward


def _layer(params, x):
    return jnp.sin(x @ params) * jnp.arange(4.0)


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_made_of_nothing_is_made_again(apart):
    """Of x, the cosine and a row of numbers, the last is not saved; gradients are JAX's own."""
    params, x, g = (jax.random.normal(jax.random.key(i), (4, 4)) for i in range(3))
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    passes = Backward(_layer, params, like, apart=apart)
    assert [array.shape for array in passes.saved] == [(4, 4)] * 2
    y, saved = jax.jit(passes.forward)(params, x)
    if apart:
        dx, stashed = passes.inputs(params, saved, g)
        dp = passes.weights(params, saved, stashed)
    else:
        dp, dx = passes.both(params, saved, g)
    wanted, back = jax.vjp(_layer, params, x)
    for found, expected in zip((y, dp, dx), (wanted, *back(g)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
