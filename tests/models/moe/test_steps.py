"""Whole steps on the emulated mesh: sharded equals unsharded, schedules change nothing."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.models.moe.layers.cache import extend_cache
from cmjax.models.moe.layers.linear import quantize_params
from cmjax.models.moe.model import MoEModel
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.presets import tiny
from cmjax.models.moe.schedule import Schedule, two_stream_decode
from cmjax.models.moe.sharding import param_specs, shard_params
from cmjax.models.moe.slots import SlotTable, ep_table
from cmjax.models.moe.steps import (
    DecodeInputs,
    PrefillInputs,
    Sampling,
    abstract_decode,
    abstract_params,
    abstract_prefill,
    decode_fn,
    init_params,
    prefill_fn,
)

CONFIG = tiny()
MESHES = [RankMesh(2, 4), RankMesh(2, 2, 2)]
TABLES = {
    "redundant": ep_table(16, 8, redundant=8),
    "redundant and shared replicas": ep_table(16, 8, redundant=4, shared_replicas=4),
}


@functools.cache
def _params(precision="float32"):
    params = init_params(CONFIG, "float32", mtp=True)
    if precision == "float32":
        return params
    like = abstract_params(CONFIG, one_rank(CONFIG), precision, mtp=True)
    return quantize_params(params, like)


def _sampling(requests, *new):
    ones = jnp.ones((requests,))
    return Sampling(jnp.zeros((requests, *new)), 0 * ones, ones)


def _prompts(sequences, prompt=6):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (sequences, prompt)), jnp.int32)
    lengths = jnp.asarray(rng.integers(2, prompt + 1, (sequences,)), jnp.int32)
    return PrefillInputs(tokens, lengths, _sampling(sequences))


def _decode_inputs(inputs, prefilled, max_len=10):
    caches = extend_cache(prefilled.caches, max_len)
    requests = inputs.tokens.shape[0]
    return DecodeInputs(prefilled.tokens, inputs.lengths, caches, _sampling(requests, 2))


def _on_ranks(tree, ranks, axis=0):
    """Split the requests of one rank over ranks."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(
            x.reshape(*x.shape[:axis], ranks, x.shape[axis] // ranks, *x.shape[axis + 1 :]), axis, 0
        ),
        tree,
    )


@functools.cache
def _unsharded(precision="float32", sequences=8):
    inputs = _prompts(sequences)
    parallelism = one_rank(CONFIG)
    prefill = jax.jit(prefill_fn(CONFIG, parallelism, precision, "float32", mtp=True))
    decode = jax.jit(decode_fn(CONFIG, parallelism, precision, mtp=True))
    first = prefill(_params(precision), inputs)
    state = _decode_inputs(inputs, first)
    return inputs, first, state, decode(_params(precision), state)


def _close(got, want, atol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_sharded_steps_equal_the_unsharded_model(mesh, table):
    inputs, first, state, second = _unsharded()
    parallelism = Parallelism(table=TABLES[table], axes=mesh.axes)
    params = shard_params(_params(), parallelism)
    specs = (param_specs(params, parallelism), RANKED)

    def run(fn, arguments):
        lifted = on_every_rank(fn, mesh, specs, RANKED)
        return jax.block_until_ready(jax.jit(lifted)(params, arguments))

    got = run(
        prefill_fn(CONFIG, parallelism, "float32", "float32", mtp=True),
        _on_ranks(inputs, mesh.ranks),
    )
    np.testing.assert_array_equal(got.tokens.reshape(first.tokens.shape), first.tokens)
    _close(got.logits.reshape(first.logits.shape), first.logits)

    ranked = dataclasses.replace(
        _on_ranks(dataclasses.replace(state, caches=()), mesh.ranks),
        caches=_on_ranks(state.caches, mesh.ranks, axis=1),
    )
    got = run(decode_fn(CONFIG, parallelism, "float32", mtp=True), ranked)
    np.testing.assert_array_equal(got.sampled.reshape(second.sampled.shape), second.sampled)
    np.testing.assert_array_equal(got.tokens.reshape(second.tokens.shape), second.tokens)
    np.testing.assert_array_equal(got.lengths.reshape(-1), second.lengths)
    _close(got.caches, _on_ranks(second.caches, mesh.ranks, axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_sequence_parallel_prefill_equals_the_unsharded_model(mesh):
    inputs, first, _, _ = _unsharded()
    parallelism = Parallelism(
        table=ep_table(16, 8, redundant=8), axes=mesh.axes, sequence_parallel=True
    )
    params = shard_params(_params(), parallelism)
    fn = prefill_fn(CONFIG, parallelism, "float32", "float32", mtp=True)
    lifted = on_every_rank(fn, mesh, (param_specs(params, parallelism), RANKED), RANKED)
    got = jax.block_until_ready(jax.jit(lifted)(params, _on_ranks(inputs, 8)))
    _close(got.logits.reshape(first.logits.shape), first.logits)
    _close(got.caches, _on_ranks(first.caches, 8, axis=1))


@pytest.mark.slow
def test_a_decode_step_has_consistent_types_on_a_plain_mesh():
    _, _, state, second = _unsharded()
    mesh = RankMesh(2, 4)
    parallelism = Parallelism(table=TABLES["redundant and shared replicas"], axes=mesh.axes)
    params = shard_params(_params(), parallelism)
    fn = decode_fn(CONFIG, parallelism, "float32", mtp=True)
    specs = (param_specs(params, parallelism), RANKED)
    lifted = on_every_rank(fn, mesh, specs, RANKED, virtual=False)
    ranked = dataclasses.replace(
        _on_ranks(dataclasses.replace(state, caches=()), 8),
        caches=_on_ranks(state.caches, 8, axis=1),
    )
    got = jax.block_until_ready(jax.jit(lifted)(params, ranked))
    np.testing.assert_array_equal(got.sampled.reshape(second.sampled.shape), second.sampled)


@pytest.mark.slow
def test_per_layer_tables_move_experts_without_changing_the_result():
    inputs, first, _, _ = _unsharded()
    mesh = RankMesh(2, 4)
    rng = np.random.default_rng(1)
    tables = []
    for _ in range(CONFIG.moe_layers + 1):
        slots = [*range(16), *rng.choice(16, 8, replace=False)]
        tables.append(SlotTable(tuple(rng.permutation(slots)), 8, 16))
    parallelism = Parallelism(table=tables[0], axes=mesh.axes)
    params = shard_params(_params(), parallelism, tables)
    fn = prefill_fn(CONFIG, parallelism, "float32", "float32", mtp=True)
    lifted = on_every_rank(fn, mesh, (param_specs(params, parallelism), RANKED), RANKED)
    got = jax.block_until_ready(jax.jit(lifted)(params, _on_ranks(inputs, 8)))
    _close(got.logits.reshape(first.logits.shape), first.logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        two_stream_decode(),
        Schedule(microbatches=2, order="stage"),
        Schedule(microbatches=2, order="interleaved"),
    ],
    ids=["two streams", "stage order", "interleaved"],
)
def test_results_do_not_depend_on_the_schedule(schedule):
    inputs, first, state, second = _unsharded()
    parallelism = one_rank(CONFIG, schedule)
    got = jax.jit(prefill_fn(CONFIG, parallelism, "float32", "float32", mtp=True))(
        _params(), inputs
    )
    _close(got.logits, first.logits)
    halves = tuple(
        jax.tree.map(lambda x, at=at: x[:, at], state.caches[0]) for at in (slice(4), slice(4, 8))
    )
    state = dataclasses.replace(state, caches=halves)
    got = jax.jit(decode_fn(CONFIG, parallelism, "float32", mtp=True))(_params(), state)
    np.testing.assert_array_equal(got.sampled, second.sampled)
    np.testing.assert_array_equal(got.tokens, second.tokens)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), *got.caches)
    _close(joined, second.caches[0])


@pytest.mark.slow
def test_speculative_decoding_emits_what_plain_greedy_decoding_does():
    inputs = _prompts(2)
    parallelism = one_rank(CONFIG)
    prefill = jax.jit(prefill_fn(CONFIG, parallelism, "float32", "float32", mtp=True))
    first = prefill(_params(), inputs)
    cache = extend_cache(first.caches, 32)
    outputs = {}
    for drafts in (0, 1, 3):
        decode = jax.jit(decode_fn(CONFIG, parallelism, "float32", mtp=True))
        start = jnp.concatenate([first.tokens, first.tokens[:, 1:], first.tokens[:, 1:]], axis=1)
        state = DecodeInputs(
            start[:, : 1 + drafts], inputs.lengths, cache, _sampling(2, 1 + drafts)
        )
        found = [[int(t)] for t in first.tokens[:, 0]]
        for _ in range(8):
            out = decode(_params(), state)
            for request, (tokens, count) in enumerate(zip(out.sampled, out.emitted, strict=True)):
                found[request] += [int(t) for t in tokens[:count]]
            state = DecodeInputs(out.tokens, out.lengths, out.caches, state.sampling)
        outputs[drafts] = [tokens[:9] for tokens in found]
    assert outputs[1] == outputs[0]
    assert outputs[3] == outputs[0]


@pytest.mark.slow
def test_drafting_after_prefill_and_after_decode_is_the_same_computation():
    # prefill a prompt and decode one token, or prefill the prompt with that token appended
    inputs, first, state, second = _unsharded()
    full = inputs.tokens.shape[1]
    room = jnp.pad(inputs.tokens, ((0, 0), (0, 1)))
    request = jnp.arange(room.shape[0])
    longer = PrefillInputs(
        room.at[request, inputs.lengths].set(first.tokens[:, 0]),
        inputs.lengths + 1,
        inputs.sampling,
    )
    prefill = jax.jit(prefill_fn(CONFIG, one_rank(CONFIG), "float32", "float32", mtp=True))
    again = prefill(_params(), longer)
    rejected = np.asarray(second.emitted) == 1
    assert rejected.any()
    np.testing.assert_array_equal(again.tokens[:, 0], second.sampled[:, 0])
    np.testing.assert_array_equal(again.tokens[rejected, 1], second.tokens[rejected, 1])
    real = (np.arange(full + 1) < np.asarray(longer.lengths)[:, None])[None, ..., None]
    for got, want in zip(
        jax.tree.leaves(second.caches[0]), jax.tree.leaves(again.caches[0]), strict=True
    ):
        np.testing.assert_allclose(got[:, :, : full + 1] * real, want * real, atol=1e-5)
    assert state.caches[0].mtp is not None


def test_a_correct_draft_is_accepted_and_a_wrong_one_is_not():
    inputs, _, state, _ = _unsharded(sequences=2)
    decode = jax.jit(decode_fn(CONFIG, one_rank(CONFIG), "float32", mtp=True))
    sampled = decode(_params(), state).sampled
    right = dataclasses.replace(state, tokens=state.tokens.at[:, 1].set(sampled[:, 0]))
    wrong = dataclasses.replace(state, tokens=state.tokens.at[:, 1].set(sampled[:, 0] ^ 1))
    np.testing.assert_array_equal(decode(_params(), right).emitted, [2, 2])
    out = decode(_params(), wrong)
    np.testing.assert_array_equal(out.emitted, [1, 1])
    np.testing.assert_array_equal(out.lengths, inputs.lengths + 1)
    np.testing.assert_array_equal(out.tokens[:, 0], sampled[:, 0])


@pytest.mark.slow
def test_int8_logits_stay_close_to_float32():
    inputs, first, _, _ = _unsharded()
    fn = jax.jit(prefill_fn(CONFIG, one_rank(CONFIG), "int8", "int8", mtp=True))
    got = fn(_params("int8"), inputs)
    assert (
        _params("int8")["main"]["moe"]["layers"]["moe"]["experts"]["down"]["weight"].dtype == "int8"
    )
    a, b = np.asarray(got.logits, np.float64).ravel(), np.asarray(first.logits, np.float64).ravel()
    assert np.corrcoef(a, b)[0, 1] > 0.99


@pytest.mark.slow
def test_int8_cache_decodes_close_to_a_float_cache():
    inputs, first, _, _ = _unsharded()
    prefill = jax.jit(prefill_fn(CONFIG, one_rank(CONFIG), "float32", "int8", mtp=True))
    quantized = prefill(_params(), inputs).caches[0].moe
    assert quantized.latent.dtype == jnp.int8
    exact = first.caches[0].moe.latent
    error = jnp.abs(quantized.latent * quantized.scale[..., None] - exact)
    assert float(jnp.max(error / quantized.scale[..., None])) <= 0.5 + 1e-3


FULL_SIZE = """
import jax, numpy as np
from cmjax.mesh import RankMesh, on_every_rank, prepare_devices
prepare_devices(48)
from cmjax.models.moe import *
mesh, config, schedule = RankMesh(48, 8), tiny(), two_stream_decode()
table = ep_table(config.routed_experts, 384, redundant=384 - config.routed_experts)
parallelism = Parallelism(table=table, axes=mesh.axes, schedule=schedule, capacity=4)
one = init_params(config, "float32", mtp=True)
step = abstract_decode(
    config, schedule, table, mesh, requests=2, context=8,
    capacity=4, precision="float32", kv_cache="float32", mtp=1,
)
inputs = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), step.args[1])
tokens = np.random.default_rng(0).integers(0, config.vocab_size, inputs.tokens.shape)
inputs.tokens[:] = tokens
params = jax.tree.map(np.asarray, shard_params(one, parallelism))
lifted = jax.jit(on_every_rank(step.fn, mesh, step.in_specs, step.out_specs))
got = jax.block_until_ready(lifted(params, inputs))
alone = jax.jit(decode_fn(config, one_rank(config, schedule), "float32", mtp=True))
for rank in (0, 200, 383):
    want = alone(one, jax.tree.map(lambda x: x[rank], inputs))
    np.testing.assert_array_equal(got.sampled[rank], want.sampled)
    np.testing.assert_array_equal(got.tokens[rank], want.tokens)
print("decoded on", mesh.ranks)
"""


@pytest.mark.slow
def test_a_two_stream_decode_step_runs_on_384_emulated_ranks():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", FULL_SIZE], env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "decoded on 384" in done.stdout


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: abstract_decode(CONFIG, Schedule(), TABLES["redundant"], RankMesh(2, 8), 2, 8),
            "slot table is for 8 ranks, the mesh has 16",
        ),
        (
            lambda: abstract_prefill(
                dataclasses.replace(CONFIG, heads=12),
                Schedule(),
                TABLES["redundant"],
                RankMesh(1),
                2,
                8,
            ),
            "12 heads and 8 ranks",
        ),
        (
            lambda: abstract_decode(
                CONFIG, Schedule(), TABLES["redundant"], RankMesh(1), 2, 8, precision="int4"
            ),
            "arithmetic must be one of float32, bfloat16, int8, msd_w8a16.* got 'int4'",
        ),
        (
            lambda: abstract_decode(
                CONFIG, Schedule(), TABLES["redundant"], RankMesh(1), 2, 8, kv_cache="fp8"
            ),
            "kv_cache must be one of",
        ),
        (
            lambda: abstract_decode(
                dataclasses.replace(CONFIG, mtp_layers=0),
                Schedule(),
                TABLES["redundant"],
                RankMesh(1),
                2,
                8,
            ),
            "mtp needs a config with mtp_layers >= 1",
        ),
        (
            lambda: MoEModel(
                dataclasses.replace(CONFIG, shared_experts=2),
                Parallelism(table=ep_table(16, 1, shared_replicas=1)),
                precision="float32",
                rngs=nnx.Rngs(params=0),
            ),
            "shared replicas in slots need shared_experts = 1",
        ),
        (lambda: Parallelism(table=TABLES["redundant"]), "8 ranks needs the mesh axes"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()
