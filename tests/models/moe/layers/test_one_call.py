"""What a CPU runs as one call in a decode step, against the operations that it stands for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax import native
from cmjax.mesh import RankMesh, on_every_rank
from cmjax.models.moe import from_config, presets, tiny
from cmjax.models.moe.config import GroupedAttention
from cmjax.models.moe.layers import gqa, heads, moe, norm, route, sorted_experts
from cmjax.models.moe.layers.linear import quantize_columns
from cmjax.models.moe.schedule import Schedule
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.steps import abstract_decode
from cmjax.primitives.define import reference_of
from cmjax.primitives.msd import quantize_weight
from cmjax.program import trace

needs_kernels = pytest.mark.skipif(not native.status().enabled, reason=native.status().reason)
GROUPED = dataclasses.replace(
    tiny(), attention=GroupedAttention(kv_heads=2, head_dim=16, qk_norm=True), family="qwen3_moe"
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def _both(p, operands, **params):
    """Results of the kernels, and of the reference by XLA alone."""
    got = jax.jit(functools.partial(p.bind, **params))(*operands)
    wanted = jax.jit(functools.partial(reference_of(p), **params))(*operands)
    return [np.asarray(x, np.float64) for x in got], [np.asarray(x, np.float64) for x in wanted]


def _steps(dtype):
    """Difference that rounding in another order may make, relative to the largest value."""
    return {"float32": 1e-6, "bfloat16": 2**-7}[dtype]


def _assert_close(got, wanted, dtype):
    np.testing.assert_allclose(got, wanted, atol=_steps(dtype) * np.abs(wanted).max(), rtol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1024), (3, 2, 37), (64, 16)])
def test_a_norm_is_that_of_its_formula(rng, dtype, shape):
    x = jnp.asarray(3 * rng.standard_normal(shape), dtype)
    gain = jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)
    (got,), _ = _both(norm.rms_norm_p, (x, gain), eps=1e-6)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-6)
    _assert_close(got, exact * np.asarray(gain, np.float64), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["int8", "mxfp4"])
@pytest.mark.parametrize("tokens, copies", [(1, 1), (1, 4), (5, 2), (64, 3)])
def test_experts_are_those_of_their_stages(rng, dtype, format, tokens, copies):
    hidden, ffn, count = 64, 96, 7
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    up = quantize_weight(draw(count, 2 * ffn, hidden), format=format)
    down = quantize_weight(draw(count, hidden, ffn), format=format)
    slots = rng.permuted(np.tile(np.arange(count), (tokens, 1)), axis=1)[:, :copies]
    slots[: tokens // 2] = slots[0]  # some slots get many rows, others none
    x, weights = draw(tokens, hidden).astype(dtype), draw(tokens, copies)
    operands = x, jnp.asarray(slots, jnp.int32), weights, up.values, up.scale, down.values
    (got,), (wanted,) = _both(
        sorted_experts.sorted_experts_p, (*operands, down.scale), format=format
    )
    # steps of the second product change where the activation is rounded otherwise
    _assert_close(got, wanted, "bfloat16" if dtype == "bfloat16" else "float32")


@needs_kernels
@pytest.mark.skipif(native.status().isa == "scalar", reason="no kernel multiplies int8 here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens, copies", [(1, 1), (1, 4), (5, 2), (64, 3)])
@pytest.mark.parametrize("hidden, ffn", [(64, 96), (70, 33)])
def test_experts_of_w8a8_are_those_of_their_stages(rng, dtype, tokens, copies, hidden, ffn):
    count = 7
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    up, up_scale = quantize_columns(draw(count, hidden, 2 * ffn))
    down, down_scale = quantize_columns(draw(count, ffn, hidden))
    slots = rng.permuted(np.tile(np.arange(count), (tokens, 1)), axis=1)[:, :copies]
    slots[: tokens // 2] = slots[0]  # some slots get many rows, others none
    x, weights = draw(tokens, hidden).astype(dtype), draw(tokens, copies)
    operands = x, jnp.asarray(slots, jnp.int32), weights, up, up_scale, down, down_scale
    (got,), (wanted,) = _both(sorted_experts.sorted_w8a8_p, operands)
    # one between two steps of 127 may go to either where the activation is rounded otherwise
    np.testing.assert_allclose(got, wanted, atol=np.abs(wanted).max() / 64, rtol=2**-7)
    assert np.median(np.abs(got - wanted)) <= _steps(dtype) * np.abs(wanted).max()


@needs_kernels
@pytest.mark.parametrize("slot", [-1, 7])
def test_a_slot_that_is_not_there_is_an_error(rng, slot):
    w = quantize_weight(jnp.ones((7, 64, 64)))
    x, slots = jnp.ones((1, 64)), jnp.full((1, 1), slot, jnp.int32)
    down = quantize_weight(jnp.ones((7, 64, 32)))
    operands = x, slots, jnp.ones((1, 1)), w.values, w.scale, down.values, down.scale
    with pytest.raises(jax.errors.JaxRuntimeError, match="a slot lies outside"):
        jax.block_until_ready(sorted_experts.sorted_experts_p.bind(*operands, format="int8"))


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_heads_and_entries_are_those_of_their_stages(
    rng, dtype, interleave, normed, int8, fraction
):
    rope = dataclasses.replace(GROUPED.rope, interleave=interleave, fraction=fraction)
    config = dataclasses.replace(GROUPED, rope=rope)
    columns = (config.heads + 4) * 16
    qkv = jnp.asarray(rng.standard_normal((3, 2, columns)), dtype)
    positions = jnp.asarray(rng.integers(0, 90, (3, 2)), jnp.int32)
    gains = [jnp.asarray(rng.standard_normal(16), jnp.float32) for _ in range(2 * normed)]
    kind = "int8" if int8 else dtype
    got, wanted = _both(
        heads.rotary_heads_p, (qkv, positions, *gains), config=config, tensor=1, kind=kind
    )
    assert len(got) == len(wanted) == (5 if int8 else 3)
    _assert_close(got[0], wanted[0], dtype)
    if int8:
        got = [*(x * s[..., None] for x, s in zip(got[1:3], got[3:], strict=True))]
        steps = [s[..., None] for s in wanted[3:]]
        wanted = [x * s for x, s in zip(wanted[1:3], steps, strict=True)]
        for x, y, step in zip(got, wanted, steps, strict=True):
            assert (np.abs(x - y) <= (1.01 + 127 * _steps(dtype)) * step).all()
        return
    for x, y in zip(got[1:], wanted[1:], strict=True):
        _assert_close(x, y, dtype)


ROUTERS = {
    "softmax": {"scoring": "softmax", "score_bias": False, "expert_groups": 1},
    "sigmoid": {"scoring": "sigmoid", "score_bias": True, "expert_groups": 4},
}


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shared, redundant, ranks", [(0, 0, 1), (2, 2, 4)])
def test_routes_are_those_of_their_stages(rng, dtype, router, shared, redundant, ranks):
    groups = ROUTERS[router]["expert_groups"]
    config = dataclasses.replace(
        tiny(), routed_experts=16, experts_per_token=3, groups_per_token=groups, **ROUTERS[router]
    )
    if groups > 1:
        config = dataclasses.replace(config, groups_per_token=2)
    table = ep_table(16, ranks, redundant=redundant, shared_replicas=shared)
    slots, copies = map(jnp.asarray, table.arrays())
    hidden = config.hidden_size
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    x, gain, weight = draw(9, hidden).astype(dtype), draw(hidden), draw(hidden, 16) / 8
    bias = [draw(16) / 8] if config.score_bias else []
    operands = x, gain, weight, jnp.int32(ranks - 1), slots, copies, *bias
    got, wanted = _both(route.route_p, operands, config=config)
    _assert_close(got[0], wanted[0], dtype)
    same = got[1] == wanted[1]
    assert same.all() if dtype == "float32" else same.mean() > 0.9  # near ties may turn
    if dtype == "float32":
        np.testing.assert_allclose(got[2], wanted[2], rtol=1e-5)


def test_equal_scores_go_to_the_first_experts():
    config = dataclasses.replace(tiny(), groups_per_token=1, **ROUTERS["softmax"])
    slots, copies = map(jnp.asarray, ep_table(config.routed_experts, 1).arrays())
    weight = jnp.zeros((config.hidden_size, config.routed_experts))
    x, gain = jnp.ones((2, config.hidden_size)), jnp.ones(config.hidden_size)
    operands = x, gain, weight, jnp.int32(0), slots, copies
    (_, chosen, _), (_, wanted, _) = _both(route.route_p, operands, config=config)
    assert (chosen == wanted).all() and (chosen == np.arange(config.experts_per_token)).all()


@pytest.mark.parametrize("arithmetic", ["float32", "int8", "msd_w8a16", "msd_w4a16"])
@pytest.mark.parametrize("config", [GROUPED, tiny()], ids=["grouped", "latent"])
def test_the_price_of_a_step_is_that_of_its_stages(monkeypatch, config, arithmetic):
    """The traced program is equal, operation by operation."""
    if arithmetic == "msd_w4a16":
        config = presets.deepseek_r1()

    def program():
        mesh = RankMesh(nodes=1, npus=1)
        kind = "float32" if arithmetic == "float32" else "int8"
        step = abstract_decode(
            config,
            Schedule(),
            ep_table(config.routed_experts, 1),
            mesh,
            requests=4,
            context=64,
            precision=arithmetic,
            kv_cache=kind,
            mtp=0,
        )
        return trace(
            on_every_rank(step.fn, mesh, step.in_specs, step.out_specs, abstract=True), *step.args
        )

    with_calls = program()
    for module, name in (
        (moe, "is_mixed_at_once"),
        (moe, "is_routed_at_once"),
        (gqa, "is_one_call"),
        (norm, "is_few"),
    ):
        monkeypatch.setattr(module, name, lambda *_: False)
    assert repr(program()) == repr(with_calls)


def test_derivatives_are_those_of_the_stages(monkeypatch):
    """Of few tokens: a loss through every norm and router."""
    graph, params, rest = nnx.split(from_config(GROUPED), nnx.Param, ...)
    tokens = jnp.array([[1, 2, 3, 4]])

    def slope():
        loss = lambda params: jnp.square(nnx.merge(graph, params, rest)(tokens)).mean()  # noqa: E731
        return jax.tree.leaves(jax.grad(loss)(params))

    got = slope()
    monkeypatch.setattr(moe, "is_routed_at_once", lambda *_: False)
    monkeypatch.setattr(norm, "is_few", lambda *_: False)
    for one, other in zip(got, slope(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
