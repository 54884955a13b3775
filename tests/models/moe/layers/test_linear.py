"""Linear layers and experts in each precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.models.moe.layers.experts import Experts
from cmjax.models.moe.layers.linear import Linear, Weight, matmul, quantize_columns, quantize_params
from cmjax.primitives.exchange import quantize_rows


def test_int8_matmul_is_the_exact_product_of_the_rounded_operands():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 64)).astype(np.float32)
    weight, w_scale = quantize_columns(jnp.asarray(rng.normal(size=(64, 7)), jnp.float32))
    steps, x_scale = quantize_rows(jnp.asarray(x))
    exact = np.asarray(steps, np.int64) @ np.asarray(weight, np.int64)
    want = exact * np.asarray(x_scale, np.float64)[:, None] * np.asarray(w_scale, np.float64)
    np.testing.assert_allclose(matmul(jnp.asarray(x), Weight(weight, w_scale)), want, rtol=1e-6)
    jaxpr = str(jax.make_jaxpr(matmul)(x, Weight(weight, w_scale)))
    assert re.search(r":i32\[5,7\] = cm_stacked_dot", jaxpr)


@pytest.mark.parametrize(
    ("format", "error"),
    [("bfloat16", 0.02), ("w8a8", 0.03), ("msd_w8a16", 0.02), ("msd_w4a16", 0.2)],
)
def test_low_precision_layers_stay_near_the_float32_layer(format, error):
    exact = Linear(64, 32, format="float32", rngs=nnx.Rngs(params=0))
    coarse = Linear(64, 32, format=format, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (16, 64))
    want, got = exact(x), coarse(x)
    size = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert 0 < size < error


def test_quantizing_a_float_modules_parameters_fills_the_int8_module():
    exact = Experts(3, 16, 8, format="float32", rngs=nnx.Rngs(params=0))
    coarse = Experts(3, 16, 8, format="w8a8", rngs=nnx.Rngs(params=5))
    params, like = (nnx.to_pure_dict(nnx.state(m)) for m in (exact, coarse))
    filled = quantize_params(params, like)
    back = filled["down"]["weight"] * filled["down"]["scale"][:, None, :]
    assert filled["down"]["weight"].dtype == jnp.int8
    step = filled["down"]["scale"][:, None, :]
    assert bool((jnp.abs(back - params["down"]["weight"]) <= step * 0.501).all())
    with pytest.raises(ValueError, match=r"/down/weight has shape \(3, 8, 16\), expected"):
        quantize_params(params, params | {"down": {"weight": jnp.zeros((2, 8, 16))}})
    with pytest.raises(ValueError, match="the module has parameters"):
        quantize_params(params, {"up": params["down"]})


def test_experts_apply_each_slots_weights_to_its_rows():
    experts = Experts(3, 16, 8, format="float32", rngs=nnx.Rngs(params=0))
    rows = np.asarray(jax.random.normal(jax.random.key(1), (3, 5, 16)), np.float64)
    got = experts(jnp.asarray(rows, jnp.float32), jnp.ones((3, 5)), jnp.float32)
    for slot in range(3):
        up = rows[slot] @ np.asarray(experts.gate_up.weight[...][slot], np.float64)
        gate, linear = np.split(up, 2, axis=1)
        hidden = gate / (1 + np.exp(-gate)) * linear
        want = hidden @ np.asarray(experts.down.weight[...][slot], np.float64)
        np.testing.assert_allclose(got[slot], want, atol=1e-5)


def test_int8_experts_stay_near_the_float32_experts():
    exact = Experts(3, 64, 32, format="float32", rngs=nnx.Rngs(params=0))
    coarse = Experts(3, 64, 32, format="w8a8", rngs=nnx.Rngs(params=0))
    rows = jax.random.normal(jax.random.key(1), (3, 5, 64))
    want = exact(rows, jnp.ones((3, 5)), jnp.float32)
    got = coarse(*quantize_rows(rows), jnp.float32)
    assert 0 < float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.04


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="msd_w8a16, msd_w4a16, got 'fp4'"):
        Linear(2, 2, format="fp4", rngs=nnx.Rngs(params=0))  # type: ignore
