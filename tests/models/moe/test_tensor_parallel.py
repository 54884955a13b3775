"""Tensor parallelism: a group of ranks gives the logits of one rank, and holds its part of all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.models.moe.config import GroupedAttention, dense_config
from cmjax.models.moe.layers.cache import extend_cache
from cmjax.models.moe.model import abstract_model
from cmjax.models.moe.parallelism import Parallelism, check_tensor, one_rank
from cmjax.models.moe.positions import Rope
from cmjax.models.moe.presets import qwen3_8b, tiny
from cmjax.models.moe.schedule import Schedule
from cmjax.models.moe.sharding import param_specs, shard_params
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.steps import (
    DecodeInputs,
    PrefillInputs,
    Sampling,
    abstract_decode,
    abstract_prefill,
    decode_fn,
    init_params,
    prefill_fn,
)

LATENT = tiny()
GROUPED = dataclasses.replace(
    LATENT,
    attention=GroupedAttention(kv_heads=2, head_dim=16, qk_norm=True),
    rope=Rope(interleave=False),
    mtp_layers=0,
)
BIASED = dataclasses.replace(
    GROUPED,
    attention=GroupedAttention(kv_heads=4, head_dim=16, bias=True, out_bias=True),
    ffn_bias=True,
    vocab_size=323,  # no multiple of a group
)
GLM = dataclasses.replace(
    LATENT,
    attention=GroupedAttention(kv_heads=4, head_dim=16, qk_norm=True, bias=True),
    expert_groups=1,
    groups_per_token=1,
    rope=Rope(fraction=0.5, interleave=False),
    family="glm4_moe",
)
DENSE = dense_config(
    vocab_size=320,
    hidden_size=64,
    layers=3,
    heads=8,
    attention=GroupedAttention(kv_heads=8, head_dim=16),
    ffn_size=96,
    tie_embeddings=True,
    family="llama",
)
MODELS = {"latent": LATENT, "grouped": GROUPED, "biased": BIASED, "glm": GLM, "dense": DENSE}
RANKS, EACH = 8, 2  # requests of a rank


def _mesh(tensor):
    return RankMesh(1, 4, 2, tensor=8) if tensor == 8 else RankMesh(2, 2, 2, tensor=tensor)


def _parallelism(config, mesh, shared=0, **options):
    experts = config.routed_experts
    table = ep_table(experts, RANKS, -(experts + shared) % RANKS, shared)
    return Parallelism(
        table=table, axes=mesh.axes, tensor=mesh.tensor, tensor_axes=mesh.tensor_axes, **options
    )


@functools.cache
def _params(name):
    """Random everywhere, so that no bias or gain is a number that hides a mistake."""
    config = MODELS[name]
    params = init_params(config, "float32", mtp=config.mtp_layers > 0)
    rng = np.random.default_rng(0)

    def shaken(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(shaken, params)


def _sampling(requests, *new):
    ones = jnp.ones((requests,))
    return Sampling(jnp.zeros((requests, *new)), 0 * ones, ones)


def _ranked(tree):
    return jax.tree.map(lambda x: x.reshape(RANKS, x.shape[0] // RANKS, *x.shape[1:]), tree)


@functools.cache
def _alone(name):
    """Prompts, their prefill on one rank, the state after it, and a step and its logits from it."""
    config = MODELS[name]
    mtp = config.mtp_layers > 0
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (RANKS * EACH, 5)), jnp.int32)
    lengths = jnp.asarray(rng.integers(2, 6, (RANKS * EACH,)), jnp.int32)
    prompts = PrefillInputs(tokens, lengths, _sampling(RANKS * EACH))
    run = jax.jit(prefill_fn(config, one_rank(config), "float32", "float32", mtp=mtp))
    first = run(_params(name), prompts)
    state = DecodeInputs(
        first.tokens,
        lengths,
        extend_cache(first.caches, 8),
        _sampling(RANKS * EACH, first.tokens.shape[1]),
    )
    step = jax.jit(decode_fn(config, one_rank(config), "float32", mtp=mtp))
    scores = jax.jit(_scores(config, one_rank(config)))
    return prompts, first, state, step(_params(name), state), scores(_params(name), state)


def _scores(config, parallelism):
    """The logits of a decode step, which its output does not hold."""
    graph, _ = abstract_model(config, parallelism, "float32", mtp=config.mtp_layers > 0)

    def fn(params, inputs):
        main = nnx.merge(graph, params).main
        hidden, _ = main.decode((inputs.tokens,), inputs.caches, (inputs.lengths,))
        return main.logits(hidden[0])

    return fn


def _close(got, want):
    """Within 1e-5 of the largest score, or of one."""
    atol = 1e-5 * max(1.0, float(jnp.abs(want).max()))
    np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, atol=atol)


def _own(caches, want, tensor):
    """One rank's caches of all requests, from those of all ranks: heads of a group side by side."""

    def whole(x, full):  # [ranks, layers, group's requests, tokens, ...]
        groups = x.reshape(RANKS // tensor, tensor, *x.shape[1:])
        if full.ndim > 4:  # of grouped-query attention: a part of the heads, or copies of them
            copies = tensor * x.shape[-2] // full.shape[-2]
            parts = jnp.moveaxis(groups[:, ::copies], 1, -3)
            parts = parts.reshape(*parts.shape[:-3], full.shape[-2], full.shape[-1])
        else:
            np.testing.assert_allclose(groups - groups[:, :1], 0, atol=1e-5)
            parts = groups[:, 0]
        return jnp.moveaxis(parts, 0, 1).reshape(full.shape)

    return jax.tree.map(whole, caches, want)


CASES = [
    ("latent", 2),
    pytest.param("latent", 4, marks=pytest.mark.slow),
    pytest.param("latent", 8, marks=pytest.mark.slow),
    pytest.param("grouped", 2, marks=pytest.mark.slow),
    ("grouped", 4),  # two ranks for every key head
    pytest.param("biased", 4, marks=pytest.mark.slow),
    pytest.param("biased", 2, marks=pytest.mark.slow),
    ("glm", 4),
    pytest.param("glm", 8, marks=pytest.mark.slow),  # two ranks for every key head
    ("dense", 4),
    pytest.param("dense", 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "tensor"), CASES)
def test_a_group_of_ranks_gives_the_logits_and_caches_of_one_rank(name, tensor):
    config, mesh = MODELS[name], _mesh(tensor)
    prompts, first, state, second, scores = _alone(name)
    mtp = config.mtp_layers > 0
    parallelism = _parallelism(config, mesh)
    params = shard_params(_params(name), parallelism, config=config)
    specs = (param_specs(params, parallelism), RANKED)

    def run(fn, inputs):
        lifted = on_every_rank(fn, mesh, specs, RANKED)
        return jax.block_until_ready(jax.jit(lifted)(params, inputs))

    got = run(prefill_fn(config, parallelism, "float32", "float32", mtp=mtp), _ranked(prompts))
    _close(got.logits, first.logits)
    np.testing.assert_array_equal(got.tokens.reshape(first.tokens.shape), first.tokens)
    for a, b in zip(
        jax.tree.leaves(_own(got.caches, first.caches, tensor)),
        jax.tree.leaves(first.caches),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)

    ranked = dataclasses.replace(
        _ranked(dataclasses.replace(state, caches=())),
        caches=jax.vmap(lambda caches: extend_cache(caches, 8))(got.caches),
    )
    found = run(_scores(config, parallelism), ranked)
    _close(found, scores)
    out = run(decode_fn(config, parallelism, "float32", mtp=mtp), ranked)
    for field in ("sampled", "emitted", "tokens", "lengths"):
        want = getattr(second, field)
        np.testing.assert_array_equal(getattr(out, field).reshape(want.shape), want)


@pytest.mark.slow
def test_a_group_decodes_alike_with_shared_replicas_in_slots_and_two_microbatches():
    config, mesh = LATENT, _mesh(4)
    _, _, state, second, _ = _alone("latent")
    parallelism = _parallelism(config, mesh, 8, schedule=Schedule(microbatches=2))
    params = shard_params(_params("latent"), parallelism, config=config)
    assert "shared" not in params["main"]["moe"]["layers"]["moe"]

    def halves(x):  # [layers, requests, ...]: the group's requests of each microbatch
        x = x.reshape(x.shape[0], RANKS // 4, 4, 2, EACH // 2, *x.shape[2:])
        x = jnp.moveaxis(x, (1, 3), (0, 1))  # [groups, microbatches, layers, ranks, requests, ...]
        x = x.reshape(RANKS // 4, 2, x.shape[2], 4 * EACH // 2, *x.shape[5:])
        return jnp.repeat(x, 4, axis=0)

    both = jax.tree.map(halves, state.caches[0])
    caches = tuple(jax.tree.map(lambda x, i=i: x[:, i], both) for i in range(2))
    ranked = dataclasses.replace(_ranked(dataclasses.replace(state, caches=())), caches=caches)
    fn = decode_fn(config, parallelism, "float32", mtp=True)
    lifted = on_every_rank(fn, mesh, (param_specs(params, parallelism), RANKED), RANKED)
    out = jax.block_until_ready(jax.jit(lifted)(params, ranked))
    for field in ("sampled", "emitted", "tokens", "lengths"):
        want = getattr(second, field)
        np.testing.assert_array_equal(getattr(out, field).reshape(want.shape), want)


@pytest.mark.parametrize("precision", ["int8", "msd_w8a16", "msd_w4a16"])
@pytest.mark.parametrize("name", ["latent", "grouped"])
def test_parts_of_few_bit_weights_have_the_shapes_of_a_ranks_model(name, precision):
    wide = {"hidden_size": 64, "ffn_size": 128, "expert_ffn_size": 64}
    config = dataclasses.replace(MODELS[name], **wide)
    if name == "latent":
        sizes = dataclasses.replace(config.attention, q_lora_rank=32)
        config = dataclasses.replace(config, attention=sizes)
    parallelism = _parallelism(config, _mesh(2))
    whole = init_params(config, precision)
    split = shard_params(whole, parallelism, config=config)
    shapes = abstract_model(config, parallelism, precision)[1]
    specs = param_specs(shapes, parallelism)

    def check(path, spec, held, shape):
        wanted = (RANKS, *shape.shape) if spec is RANKED else shape.shape
        assert (held.shape, held.dtype) == (wanted, shape.dtype), path

    jax.tree_util.tree_map_with_path(check, specs, split, shapes)


@pytest.mark.slow
def test_parts_of_few_bit_weights_multiply_like_the_whole():
    config, mesh = LATENT, _mesh(4)
    prompts = _alone("latent")[0]
    parallelism = _parallelism(config, mesh)
    for precision, least in (("int8", 0.999), ("msd_w8a16", 0.9998)):
        whole = init_params(config, precision, mtp=True)
        alone = jax.jit(prefill_fn(config, one_rank(config), precision, "float32", mtp=True))
        want = alone(whole, prompts).logits
        params = shard_params(whole, parallelism, config=config)
        fn = prefill_fn(config, parallelism, precision, "float32", mtp=True)
        lifted = on_every_rank(fn, mesh, (param_specs(params, parallelism), RANKED), RANKED)
        got = jax.block_until_ready(jax.jit(lifted)(params, _ranked(prompts))).logits
        got = np.asarray(got, np.float64).reshape(want.shape)
        # a token near the border of two experts goes to the other one: the median is not moved
        alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(got, want, strict=True)]
        assert np.median(alike) > least, precision


def test_a_rank_of_a_group_holds_its_part_and_no_more():
    one = abstract_model(qwen3_8b(), one_rank(qwen3_8b()), "bfloat16")[1]
    table = ep_table(1, 8, 7)

    def held(tensor):
        mesh = RankMesh(1, 8, 1, tensor=tensor)
        parallelism = Parallelism(
            table=table, axes=mesh.axes, tensor=tensor, tensor_axes=mesh.tensor_axes
        )
        shapes = abstract_model(qwen3_8b(), parallelism, "bfloat16")[1]
        return sum(x.size for x in jax.tree.leaves(shapes))

    whole = sum(x.size for x in jax.tree.leaves(one))
    norms = qwen3_8b().layers * (2 * 4096 + 2 * 128) + 4096
    assert held(1) == whole
    assert held(8) == (whole - norms) // 8 + norms


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("name", ["latent", "grouped", "dense"])
def test_steps_trace_with_caches_of_the_groups_requests(name, tensor):
    config, mesh = MODELS[name], _mesh(tensor)
    table = _parallelism(config, mesh).table
    schedule = Schedule(microbatches=2)
    mtp = min(config.mtp_layers, 1)
    common = {"precision": "float32", "kv_cache": "float32", "mtp": mtp}
    decode = abstract_decode(config, schedule, table, mesh, 3, 16, capacity=4, **common)
    prefill = abstract_prefill(
        config, schedule, table, mesh, 3, 16, sequence_parallel=False, **common
    )
    shapes = []
    for step in (decode, prefill):
        fn = on_every_rank(step.fn, mesh, step.in_specs, step.out_specs, abstract=True)
        out = jax.eval_shape(fn, *step.args)
        assert out.tokens.shape == (RANKS, 6, 1 + mtp)
        shapes.append([x.shape[:4] for x in jax.tree.leaves(out.caches)])
        assert {shape[2] for shape in shapes[-1]} == {3 * tensor}
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: check_tensor(LATENT, 3), "tp 3 does not divide the model's 8 heads; 1, 2, 4 or 8"),
        (
            lambda: check_tensor(dataclasses.replace(GROUPED, ffn_size=92), 8),
            "tp 8 does not divide the model's 92 columns of ffn_size; 1, 2 or 4 would do",
        ),
        (
            lambda: check_tensor(
                dataclasses.replace(
                    DENSE,
                    heads=12,
                    attention=GroupedAttention(kv_heads=3, head_dim=16),
                ),
                4,
            ),
            "tp 4 neither divides the model's 3 key/value heads nor is a multiple; 1, 3, 6 or 12",
        ),
        (lambda: check_tensor(LATENT, 32), r"tp 32 is outside 1\.\.16; 1, 2, 4 or 8 would do"),
        (
            lambda: shard_params({}, _parallelism(LATENT, _mesh(2))),
            "shard_params: tensor parallelism needs config",
        ),
        (
            lambda: Parallelism(table=ep_table(16, 8), axes=("node",), tensor=2),
            "tensor groups of 2 ranks need the mesh axes",
        ),
        (
            lambda: _parallelism(LATENT, _mesh(2), sequence_parallel=True),
            "sequence_parallel splits heads over all ranks and tensor over neighbours",
        ),
        (
            lambda: RankMesh(2, 8, 2, tensor=6),
            "tensor must be whole NPUs that divide a node, here one of 1, 2, 4, 8, 16; got 6",
        ),
        (
            lambda: abstract_model(
                dataclasses.replace(GROUPED, ffn_size=64),
                _parallelism(GROUPED, _mesh(4)),
                "msd_w4a16",
            ),
            "blocks of 32 do not divide a rank's part of ffn_size, 16",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(build, message):
    with pytest.raises(ValueError, match=message):
        build()
