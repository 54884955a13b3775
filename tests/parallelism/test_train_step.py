"""A plan, executed: one device's loss and gradients, the priced bytes, and the priced memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cmjax.hardware import load_machine
from cmjax.models.dense import DenseConfig, DenseModel, preset
from cmjax.parallelism import memory_of, parse_plan, plan_traffic, train_step
from cmjax.parallelism.memory import SINGLE
from cmjax.parallelism.shards import mesh_of

PANGU = dataclasses.replace(
    preset("pangu-tiny"), layers=4, hidden=32, ffn=64, sequence=16, vocab=64
)
SHALLOW = dataclasses.replace(PANGU, layers=2)
"""For plans without a pipeline, whose layers are straight code, each of which is compiled."""
LLAMA = DenseConfig(
    layers=2, hidden=32, heads=4, ffn=48, vocab=64, sequence=16, kv_heads=2,
    gated=True, norm="rms", positions="rotary", biases=False, tied=False,
)  # fmt: skip
BATCH = 8
PLANS = [
    "data=1,recompute=none",
    "data=4,recompute=selective",
    "tensor=4",
    "tensor=2,sequence_parallel=true,data=2",
    "pipeline=4,schedule=gpipe,recompute=none",
    "pipeline=2,micro_batch=2",
    "pipeline=2,schedule=interleaved,interleave=2,recompute=selective",
    "pipeline=4,schedule=zero_bubble,recompute=none",
    "data=2,optimizer=zero1",
    "data=4,optimizer=zero2,recompute=none",
    "data=4,tensor=2,optimizer=zero3",
    "data=2,tensor=2,pipeline=2,optimizer=zero1,sequence_parallel=true",
    "data=2,tensor=2,pipeline=2,optimizer=zero3,schedule=zero_bubble",
    "data=2,tensor=2,pipeline=2,interleave=2,optimizer=zero2,order=data-pipeline-tensor",
    "data=2,recompute=full:1",
    "data=2,tensor=2,pipeline=2,recompute=full:1-0/selective:1-0,optimizer=zero1",
    "pipeline=2,schedule=zero_bubble,recompute=full:0-2/selective:1-0",
    "data=4,context=2,tensor=2,optimizer=zero1,sequence_parallel=true",
    "data=2,context=2,tensor=2,pipeline=2,optimizer=zero3,schedule=zero_bubble",
    "pipeline=3",
    "pipeline=2,layers=1-3,recompute=full:1-2/selective:0-1,schedule=gpipe",
    "data=2,tensor=2,pipeline=2,layers=3-1,optimizer=zero1,sequence_parallel=true",
    "data=2,pipeline=3,layers=1-2-1,optimizer=zero2,schedule=zero_bubble,recompute=none",
    "data=2,tensor=2,pipeline=2,layers=1-3,optimizer=zero3,order=data-pipeline-tensor",
    "data=2,pipeline=2,interleave=2,layers=2-1,optimizer=zero1,recompute=full:1-0",
]
DEEP = dataclasses.replace(PANGU, layers=6)
"""For two chunks on each of two stages, of which one has a layer more."""
COUNTED = [
    "data=2,recompute=selective",
    "tensor=4,recompute=none",
    "tensor=2,sequence_parallel=true,data=2",
    "pipeline=4,schedule=gpipe,recompute=none",
    "pipeline=2,tensor=2,schedule=zero_bubble,order=pipeline-tensor-data",
    "data=2,optimizer=zero2",
    "data=2,tensor=2,optimizer=zero3,recompute=none",
    "data=2,tensor=2,pipeline=2,optimizer=zero1,sequence_parallel=true",
    "data=2,tensor=2,pipeline=2,interleave=2,optimizer=zero2,recompute=selective,"
    "order=tensor-data-pipeline",
    "tensor=2,pipeline=2,recompute=full:1-2/selective:1-0,sequence_parallel=true",
    "data=4,context=2,tensor=2,optimizer=zero3,recompute=selective",
    "data=2,context=2,tensor=2,pipeline=2,optimizer=zero1,sequence_parallel=true,"
    "order=tensor-data-pipeline",
    "data=2,tensor=2,pipeline=2,layers=3-1,optimizer=zero1,sequence_parallel=true",
    "data=2,pipeline=2,layers=1-3,optimizer=none,recompute=selective:0-1,order=pipeline-data-tensor",
    "data=2,tensor=2,pipeline=2,layers=1-3,optimizer=zero3,order=tensor-data-pipeline",
    "data=2,pipeline=3,optimizer=zero2,schedule=zero_bubble",
    "data=2,pipeline=2,interleave=2,layers=1-2,optimizer=zero1,order=pipeline-data-tensor",
]


def _tokens(config, batch=BATCH):
    return np.random.default_rng(0).integers(0, config.vocab, (batch, config.sequence + 1))


def _pangu(plan):
    if "interleave=2,layers" in plan:
        return DEEP
    return SHALLOW if "pipeline" not in plan else PANGU


@functools.cache
def _one_device(config):
    """Parameters, loss and gradients of one device."""
    graph, params = nnx.split(DenseModel(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape), params
    )
    tokens = _tokens(config)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(tokens)))(params)
    return nnx.to_pure_dict(params), float(loss), nnx.to_pure_dict(grads)


def _close(found, wanted):
    """To 1e-5 of a parameter's largest gradient; sums are in another order, so what is zero but for
    rounding (the gradient of the keys' bias) is held to that of the largest of all."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = max(float(jnp.max(jnp.abs(b))), 1e-2 * largest)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


def _check(plan, config, virtual):
    params, loss, grads = _one_device(config)
    step = train_step(plan, config, global_batch=BATCH, virtual=virtual)
    state = step.place(params)
    found, parts = jax.jit(step.gradients)(state.params, step.place_tokens(_tokens(config)))
    assert float(found) == pytest.approx(loss, rel=1e-5)
    _close(step.whole(parts), grads)
    _close(step.whole(state.params), params)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_gives_one_devices_loss_and_gradients(plan):
    _check(plan, _pangu(plan), virtual=False)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLANS[6], PLANS[11]])
def test_virtual_ranks_give_them_too(plan):
    _check(plan, _pangu(plan), virtual=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        "data=2,tensor=2,pipeline=2,optimizer=zero3", "tensor=2",
        "data=4,context=4,recompute=selective,optimizer=zero2",
    ],
)  # fmt: skip
def test_a_llama_is_split_likewise(plan):
    """Words that are not tied, keys that serve several queries, no biases, no query layer."""
    _check(plan, LLAMA, virtual=False)


@pytest.mark.slow
@pytest.mark.parametrize("plan", COUNTED)
def test_counted_bytes_are_the_priced_ones(plan):
    """To the byte, on every tier; parameters are multiples of the replicas."""
    config = _pangu(plan)
    step = train_step(plan, config, global_batch=BATCH, virtual=True, dtype=jnp.bfloat16)
    mesh = step.mesh
    machine = dataclasses.replace(
        load_machine("cloudmatrix384"),
        nodes=mesh.nodes, npus_per_node=mesh.npus, dies_per_npu=mesh.dies,
    )  # fmt: skip
    priced = plan_traffic(config, step.plan, machine, BATCH).tier_bytes
    counted = step.traffic(step.place(_one_device(config)[0]), _tokens(config)).tier_bytes
    assert {tier: counted[tier] for tier in priced} == priced
    assert sum(priced.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan, layers",
    [
        ("data=1,micro_batch=4,recompute=none", 4),
        ("data=1,micro_batch=4,recompute=full", 4),
        ("data=1,micro_batch=4,recompute=full:2", 4),
        ("data=1,micro_batch=4,recompute=full:1/selective:2", 4),
        ("data=2,micro_batch=4,optimizer=zero1", 4),
        ("data=2,micro_batch=4,optimizer=zero2,recompute=selective", 4),
        ("data=4,micro_batch=2,optimizer=zero3", 4),
        ("tensor=4,micro_batch=4", 4),
        ("pipeline=2,micro_batch=4", 8),
        ("pipeline=4,micro_batch=2,recompute=none", 4),
        ("pipeline=2,data=2,tensor=2,micro_batch=4,optimizer=zero1,schedule=gpipe", 8),
    ],
)
def test_memory_is_what_xla_assigns(plan, layers):
    """Within 15 %."""
    config = DenseConfig(layers=layers, hidden=128, heads=4, ffn=512, vocab=128, sequence=128)
    step = train_step(plan, config, global_batch=16, virtual=False)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=step.sharding),
        jax.eval_shape(lambda: step.initial(0)),
    )
    shape = step.plan.devices, 16 // step.plan.data, config.sequence + 1
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=step.sharding)
    held = step.compiled.lower(state, tokens).compile().memory_analysis()
    assigned = held.argument_size_in_bytes + held.temp_size_in_bytes
    assigned += held.output_size_in_bytes - held.alias_size_in_bytes
    priced = memory_of(config, step.plan, 16, SINGLE).peak
    print(f"{plan}: XLA {assigned / 1e6:.2f} MB, priced {priced / 1e6:.2f} MB")
    assert priced == pytest.approx(assigned, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLANS[9], PLANS[11]])
def test_steps_of_the_optimizer_are_those_of_one_device(plan):
    """Three of them, clipped, with weights that decay: what a rank has of a parameter is updated
    as the whole is."""
    config = _pangu(plan)
    params, _, _ = _one_device(config)
    graph, like = nnx.split(DenseModel(config, rngs=nnx.Rngs(0)))
    nnx.replace_by_pure_dict(like, params)
    adam = optax.adamw(1e-3, weight_decay=0.1)
    whole = optax.chain(optax.clip_by_global_norm(0.5), adam)
    tokens = _tokens(config)

    @jax.jit
    def alone(p, s):
        loss, g = jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(tokens))(p)
        updates, s = whole.update(g, s, p)
        return optax.apply_updates(p, updates), s, loss, optax.tree.norm(g)

    step = train_step(plan, config, global_batch=BATCH, optimizer=adam, clip=0.5)
    state, other = step.place(params), whole.init(like)
    for _ in range(3):
        like, other, loss, norm = alone(like, other)
        state, result = step(state, tokens)
        assert float(result.loss) == pytest.approx(float(loss), rel=1e-5)
        assert float(result.gradient_norm) == pytest.approx(float(norm), rel=1e-5)
        assert float(norm) > 0.5
    # Adam divides by a gradient's size: of what is zero but for rounding, the sign alone is left,
    # and what is nearly zero moves by a part of its step of 1e-3.
    noise = "key.bias"
    found = jax.tree_util.tree_leaves_with_path(step.whole(state.params))
    for (path, a), b in zip(found, jax.tree.leaves(nnx.to_pure_dict(like)), strict=True):
        if ".".join(str(k.key) for k in path).endswith(noise):
            continue
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "plan, batch, says",
    [
        ("tensor=3", 8, "tensor=3 must divide the 4 heads"),
        ("pipeline=8", 8, "pipeline=8 is more than the 4 layers"),
        ("pipeline=2,layers=2-3", 8, "layers=2-3 makes 5; the model has 4"),
        ("data=3", 8, "does not divide the global batch of 8"),
        ("data=2", 0, "global_batch must be a whole number >= 1, got 0"),
    ],
)
def test_a_step_that_cannot_be_split_is_refused(plan, batch, says):
    with pytest.raises(ValueError, match=says):
        train_step(plan, PANGU, global_batch=batch)


def test_another_mesh_or_other_tokens_are_refused():
    plan = parse_plan("data=2,tensor=2")
    with pytest.raises(ValueError, match=r"mesh: the plan's tensor-pipeline-data takes RankMesh"):
        train_step(plan, PANGU, mesh_of(parse_plan("data=4")), global_batch=8)
    step = train_step(plan, PANGU, global_batch=8)
    with pytest.raises(ValueError, match=r"tokens: expected \[8, 17\]"):
        step(step.initial(), np.zeros((8, 16), int))
    with pytest.raises(ValueError, match="virtual=True"):
        step.traffic(step.initial(), _tokens(PANGU))
