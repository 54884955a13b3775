"""A plan of a mixture of experts, executed: one device's loss and gradients, the priced bytes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cmjax.hardware import load_machine
from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.balancing import balanced, is_load
from cmjax.models.moe.config import GroupedAttention
from cmjax.models.moe.layers.transformer import Transformer
from cmjax.models.moe.parallelism import one_rank
from cmjax.models.moe.presets import tiny
from cmjax.models.moe.trained import trained, with_tables
from cmjax.parallelism import MoETraining, expert_step, expert_traffic, parse_plan
from cmjax.parallelism.experts import expert_memory
from cmjax.parallelism.memory import SINGLE

LATENT = MoETraining(model=dataclasses.replace(tiny(), layers=3), sequence=8)
"""Latent attention, a dense layer, a shared expert, balanced by biases."""
GROUPED = MoETraining(
    model=dataclasses.replace(
        tiny(), layers=2, dense_layers=(), heads=4, shared_experts=0, score_bias=False,
        attention=GroupedAttention(kv_heads=2, head_dim=16), family="mixtral", scoring="softmax",
        expert_groups=1, groups_per_token=1, tie_embeddings=True,
    ),
    sequence=8,
)  # fmt: skip
BATCH = 8
PLANS = [
    "data=4,expert=2,recompute=none",
    "data=4,expert=4,optimizer=zero1,micro_batch=2",
    "data=8,expert=4,optimizer=zero1",
    "data=2,recompute=selective",
    "data=4,expert=2,optimizer=zero2",
    "data=4,expert=2,optimizer=zero3,recompute=none",
    "data=2,expert=2,pipeline=2,recompute=none",
    "data=2,expert=2,pipeline=3,optimizer=zero1",
    "data=4,expert=2,pipeline=2,optimizer=zero2,recompute=selective",
    "data=2,pipeline=2,optimizer=zero3,schedule=zero_bubble",
    "data=2,expert=2,pipeline=2,optimizer=zero1,schedule=gpipe,micro_batch=2,"
    "order=tensor-data-pipeline",
    "data=2,expert=2,pipeline=2,layers=1-2,optimizer=zero1",
    "data=4,context=2,optimizer=zero1,recompute=none",
    "data=8,expert=4,context=2,optimizer=zero2,recompute=selective",
    "data=4,expert=2,context=2,pipeline=2,optimizer=zero3",
    "data=2,context=2,pipeline=2,schedule=zero_bubble",
]
"""Between them: experts alone, replicas alone, both, with stages (of which some have fewer layers,
or a dense one) and with shared sequences; every optimizer, way to recompute and schedule."""


def _tokens(training):
    shape = BATCH, training.sequence + 1
    return np.random.default_rng(0).integers(0, training.model.vocab_size, shape)


@functools.cache
def _one_device(training):
    """Parameters, loss and gradients of one device."""
    step = expert_step("data=1,recompute=none,micro_batch=8", training, global_batch=BATCH)
    state = step.place(step.random(0))
    loss, grads = jax.jit(step.gradients)(state.params, step.place_tokens(_tokens(training)))
    return step.random(0), float(loss), step.whole(grads)


@pytest.mark.slow
def test_one_device_computes_what_the_model_does():
    """The loss of `Transformer.prefill`, differentiated as a whole."""
    params, loss, grads = _one_device(LATENT)
    model, tokens = LATENT.model, _tokens(LATENT)
    graph, _ = nnx.split(
        Transformer(
            model, one_rank(model), arithmetic=Arithmetic.of("float32"), rngs=nnx.Rngs(params=0)
        )
    )

    def mean_loss(floats):
        made = nnx.merge(graph, with_tables(floats, params))
        hidden, _ = made.prefill((jnp.asarray(tokens[:, :-1]),), "float32")
        logits = made.logits(hidden[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    found, wanted = jax.value_and_grad(mean_loss)(trained(params))
    assert loss == pytest.approx(float(found), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "training"),
    [
        (PLANS[0], LATENT),
        (PLANS[1], GROUPED),
        (PLANS[2], LATENT),
        (PLANS[3], GROUPED),
        (PLANS[4], LATENT),
        (PLANS[5], LATENT),
        (PLANS[5], GROUPED),
        (PLANS[6], LATENT),
        (PLANS[7], LATENT),
        (PLANS[8], GROUPED),
        (PLANS[9], LATENT),
        (PLANS[10], GROUPED),
        (PLANS[11], LATENT),
        (PLANS[12], GROUPED),
        (PLANS[13], LATENT),
        (PLANS[14], LATENT),
        (PLANS[15], GROUPED),
    ],
)
def test_a_plan_gives_one_devices_loss_and_gradients(plan, training):
    """To 1e-5 of a parameter's largest gradient; an expert's load to the row."""
    params, loss, wanted = _one_device(training)
    step = expert_step(plan, training, global_batch=BATCH)
    state = step.place(params)
    found, grads = jax.jit(step.gradients)(state.params, step.place_tokens(_tokens(training)))
    assert float(found) == pytest.approx(loss, rel=1e-5)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(step.whole(grads)), jax.tree.leaves(wanted), strict=True
    )
    for (path, a), b in pairs:
        largest = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if is_load(path) else 1e-5 * largest)
    jax.tree.map(np.testing.assert_array_equal, step.whole(state.params), trained(params))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [*PLANS[:2], *PLANS[4:6], PLANS[7], PLANS[14]])
def test_steps_of_the_optimizer_are_those_of_one_device(plan):
    """Three of them, clipped: what a rank has of a parameter is updated as the whole is."""
    params, *_ = _one_device(LATENT)
    sgd = optax.sgd(0.1, momentum=0.9)
    whole = balanced(sgd, 1e-3)
    alone = expert_step("data=1,micro_batch=8", LATENT, global_batch=BATCH)
    step = expert_step(plan, LATENT, global_batch=BATCH, optimizer=sgd, clip=0.5)
    state, one = step.place(params), alone.place(params)
    floats = alone.whole(one.params)
    memory, gradients = whole.init(floats), jax.jit(alone.gradients)
    for _ in range(3):
        _, grads = gradients(one.params, alone.place_tokens(_tokens(LATENT)))
        grads = alone.whole(grads)
        norm = optax.tree.norm([
            g for path, g in jax.tree_util.tree_leaves_with_path(grads) if not is_load(path)
        ])  # fmt: skip
        grads = jax.tree_util.tree_map_with_path(
            lambda path, g, by=0.5 / norm: g if is_load(path) else g * by, grads
        )
        updates, memory = whole.update(grads, memory, floats)
        floats = optax.apply_updates(floats, updates)
        one = alone.place(with_tables(floats, params))
        state, result = step(state, _tokens(LATENT))
        assert float(result.gradient_norm) == pytest.approx(float(norm), rel=1e-4)
        assert float(norm) > 0.5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), step.whole(state.params), floats
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "training"),
    [
        (PLANS[0], GROUPED),
        (PLANS[1], LATENT),
        (PLANS[2], GROUPED),
        (PLANS[4], LATENT),
        (PLANS[5], GROUPED),
        (PLANS[6], GROUPED),
        (PLANS[7], LATENT),
        (PLANS[8], GROUPED),
        (PLANS[9], LATENT),
        (PLANS[11], LATENT),
        (PLANS[12], GROUPED),
        (PLANS[13], LATENT),
        (PLANS[14], GROUPED),
    ],
)
def test_counted_bytes_are_the_priced_ones(plan, training):
    """To the byte, on every tier, with as many rows as tokens send on average."""
    step = expert_step(plan, training, global_batch=BATCH)
    model, part = training.model, training.sequence // step.plan.context
    tokens = step.plan.micro_batch * part
    step = expert_step(
        plan, training, global_batch=BATCH, virtual=True, dtype=jnp.bfloat16,
        capacity=tokens * model.experts_per_token // model.routed_experts,
    )  # fmt: skip
    mesh = step.mesh
    machine = dataclasses.replace(
        load_machine("cloudmatrix384"),
        nodes=mesh.nodes, npus_per_node=mesh.npus, dies_per_npu=mesh.dies,
    )  # fmt: skip
    priced = expert_traffic(training, step.plan, machine, BATCH)
    moved = step.traffic(step.initial(), _tokens(training))
    counts = {name: pairs for name, pairs in moved.pairs.items() if "flags" not in name}
    counted = dataclasses.replace(moved, pairs=counts).tier_bytes
    assert {tier: counted[tier] for tier in priced} == priced
    assert sum(priced.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "training"),
    [
        ("micro_batch=4,recompute=none", GROUPED),
        ("micro_batch=4,recompute=selective", GROUPED),
        ("data=2,micro_batch=4,recompute=none", LATENT),
        ("data=2,micro_batch=4", LATENT),
        ("data=2,expert=2,micro_batch=4,recompute=selective", GROUPED),
        ("data=4,expert=2,micro_batch=2,optimizer=zero1,recompute=none", LATENT),
        ("data=4,micro_batch=2,optimizer=zero2,recompute=none", LATENT),
        ("data=4,expert=2,micro_batch=2,optimizer=zero3", LATENT),
        ("data=2,expert=2,pipeline=2,micro_batch=2,optimizer=zero1", GROUPED),
        ("data=4,expert=4,context=2,micro_batch=4,optimizer=zero1,recompute=none", LATENT),
    ],
)
def test_memory_is_what_xla_assigns(plan, training):
    """Within 15 %; ranks are loaded evenly, on 4 layers with 128 tokens in a sequence."""
    model = dataclasses.replace(training.model, layers=4)
    training = MoETraining(model=model, sequence=128)
    tokens = parse_plan(plan).micro_batch * 128 // parse_plan(plan).context
    rows = tokens * model.experts_per_token // model.routed_experts
    step = expert_step(plan, training, global_batch=16, virtual=False, capacity=rows)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=step.sharding),
        jax.eval_shape(lambda: step.initial(0)),
    )
    shape = step.plan.devices, 16 // step.plan.replicas, 129
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=step.sharding)
    held = step.compiled.lower(state, tokens).compile().memory_analysis()
    assigned = held.argument_size_in_bytes + held.temp_size_in_bytes
    assigned += held.output_size_in_bytes - held.alias_size_in_bytes
    machine = load_machine("cloudmatrix384")
    priced = expert_memory(training, step.plan, machine, 16, SINGLE).peak
    print(f"{plan}: XLA {assigned / 1e6:.2f} MB, priced {priced / 1e6:.2f} MB")
    assert priced == pytest.approx(assigned, rel=0.15)


@pytest.mark.parametrize(
    ("plan", "options", "says"),
    [
        ("data=4,expert=3", {}, "expert=3 must divide data=4"),
        ("data=4,context=3", {}, "context=3 must divide data=4, the sequence of 8 tokens"),
        ("data=4,expert=2,context=4", {}, "context=4 must divide .* expert=2"),
        (
            "data=4,expert=4,context=2,pipeline=2",
            {},
            "of pipeline and the expert / context ranks one must be 1",
        ),
        ("data=3", {}, "does not divide the global batch of 8"),
        ("pipeline=3", {}, "pipeline=3 is more than the 2 layers"),
        ("recompute=full:1", {}, "recompute=full:1 goes layer by layer"),
        ("data=2", {"dtype": jnp.float16}, "dtype must be float32 or bfloat16, got float16"),
    ],
)
def test_a_plan_that_is_not_executed_is_refused(plan, options, says):
    with pytest.raises(ValueError, match=says):
        expert_step(plan, GROUPED, global_batch=BATCH, **options)
