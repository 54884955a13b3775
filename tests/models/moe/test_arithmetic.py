"""Arithmetics: what they compute, beside floats and beside their own dequantized weights."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.models.moe import (
    ARITHMETICS,
    Arithmetic,
    MoEModel,
    Parallelism,
    ep_table,
    one_rank,
    tiny,
)
from cmjax.models.moe.calibrate import input_statistics, smooth
from cmjax.models.moe.config import GroupedAttention, LatentAttention
from cmjax.models.moe.layers.cache import extend_cache
from cmjax.models.moe.model import abstract_model, assemble, convert_params, parameters
from cmjax.models.moe.sharding import param_specs, shard_params
from cmjax.primitives import QuantizedWeight, dequantize_weight

LATENT = dataclasses.replace(
    tiny(),
    layers=2,
    heads=4,
    attention=LatentAttention(
        q_lora_rank=32, kv_lora_rank=32, qk_nope_dim=16, qk_rope_dim=8, v_dim=16
    ),
    mtp_layers=0,
)
GROUPED = dataclasses.replace(LATENT, attention=GroupedAttention(kv_heads=2, head_dim=32, window=8))
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 12)).astype(np.int32)


@functools.cache
def _model(config):
    return MoEModel(config, one_rank(config), precision="float32", rngs=nnx.Rngs(params=0))


def _of(form="float32", **others):
    fields: dict[str, Any] = {"projections": form, "dense": form, "experts": form, "head": form}
    plain: dict[str, Any] = {"activations": "float32", "kv_cache": "float32"}
    return Arithmetic(**(fields | plain | others))


@functools.cache
def _converted(config, arithmetic):
    return _model(config).with_arithmetic(arithmetic)


@jax.jit
def _logits(model, tokens):
    return model(tokens)


def _distance(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def _dequantized(params, like):
    """The float parameters that few-bit ones stand for."""
    if not isinstance(like, dict):
        return params
    if "values" in params:
        form = "mxfp4" if params["values"].dtype == jnp.uint8 else "int8"
        group = 32 if form == "mxfp4" else None
        held = QuantizedWeight(
            values=params["values"], scale=params["scale"], format=form, group_size=group
        )
        return {"weight": jnp.swapaxes(dequantize_weight(held), -1, -2)}
    return {key: _dequantized(params[key], like[key]) for key in like}


@pytest.mark.slow
@pytest.mark.parametrize("config", [LATENT, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize(("form", "bound"), [("msd_w8a16", 1e-3), ("msd_w4a16", 0.3)])
def test_msd_models_equal_float_models_of_the_same_rounded_weights(config, form, bound):
    """Splitting leaves M / 64516 of each activation, MXFP4 alpha / 64 (1.7 % of a product), and
    some ten products follow one another."""
    coarse = _converted(config, _of(form))
    graph, like = abstract_model(config, one_rank(config), "float32")
    same = assemble(graph, _dequantized(parameters(coarse), like))
    distance = _distance(_logits(coarse, TOKENS), _logits(same, TOKENS))
    assert 0 < distance < bound


@pytest.mark.slow
def test_int8_parameters_take_the_bytes_of_their_format():
    def nbytes(form):
        experts = parameters(_converted(LATENT, _of(form)))["main"]["moe"]["layers"]["moe"]
        return sum(x.nbytes for x in jax.tree.leaves(experts["experts"]["gate_up"]))

    values, columns = 16 * 64 * 64, 16 * 64
    assert nbytes("float32") == 4 * values
    assert nbytes("w8a8") == nbytes("msd_w8a16") == values + 4 * columns
    assert nbytes("msd_w4a16") == values // 2 + values // 32


@pytest.mark.parametrize("name", ["msd_w8a16", "msd_w4a16"])
def test_a_head_in_eight_bits_moves_the_scores_by_their_rounding_and_halves_its_bytes(name):
    """A weight is off by up to 1/254 of the largest of its column."""
    plain, narrow = ARITHMETICS[name], ARITHMETICS[f"{name}_head8"]
    assert dataclasses.replace(narrow, head=plain.head) == plain
    before, after = (_converted(GROUPED, arithmetic) for arithmetic in (plain, narrow))
    assert 0 < _distance(_logits(after, TOKENS), _logits(before, TOKENS)) < 1e-2
    heads = [parameters(model)["main"]["head"] for model in (before, after)]
    assert heads[1]["values"].nbytes * 2 == heads[0]["weight"].nbytes


@pytest.mark.parametrize("config", [LATENT, GROUPED], ids=["latent", "grouped"])
def test_pasa_in_half_precision_stays_near_exact_attention(config):
    """Half precision has 11 bits; scores here are far from overflow."""
    got = _logits(_converted(config, _of(attention="pasa_fp16")), TOKENS)
    assert 0 < _distance(got, _logits(_model(config), TOKENS)) < 2e-2


@pytest.mark.parametrize("config", [LATENT, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize(
    ("arithmetic", "bound"),
    [
        (_of("msd_w8a16"), 1e-3),
        (_of(attention="pasa_fp16"), 2e-2),
        (_of(kv_cache="mxfp4"), 0.4),
    ],
    ids=["msd_w8a16", "pasa_fp16", "mxfp4 cache"],
)
def test_decoding_equals_whole_prompts(config, arithmetic, bound):
    """To rounding; prefill attends before the cache rounds, so an MXFP4 one tells them apart."""
    model = _converted(config, arithmetic)
    want = _logits(model, TOKENS)[:, -1:]

    @jax.jit
    def last(model, tokens):
        _, caches = model.main.prefill((tokens[:, :-1],), arithmetic.kv_cache)
        lengths = jnp.full((tokens.shape[0],), tokens.shape[1] - 1, jnp.int32)
        cache = extend_cache(caches[0], 16)
        hidden, _ = model.main.decode((tokens[:, -1:],), (cache,), (lengths,))
        return model.main.logits(hidden[0])

    assert _distance(last(model, TOKENS), want) < bound


@pytest.mark.slow
@pytest.mark.parametrize("form", ["w8a8", "msd_w4a16"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_converted_models_give_the_same_logits_on_a_mesh(form, sequence_parallel):
    arithmetic, mesh = _of(form), RankMesh(1, 4)
    want = _logits(_converted(LATENT, arithmetic), np.repeat(TOKENS, 2, 0))
    parallelism = Parallelism(
        table=ep_table(16, 4), axes=mesh.axes, sequence_parallel=sequence_parallel
    )
    graph, like = abstract_model(LATENT, parallelism, arithmetic)
    sharded = shard_params(parameters(_converted(LATENT, arithmetic)), parallelism)
    specs = param_specs(like, parallelism)

    def rank(params, tokens):
        return nnx.merge(graph, params)(tokens)

    lifted = jax.jit(on_every_rank(rank, mesh, (specs, RANKED), RANKED))
    got = lifted(sharded, np.repeat(TOKENS, 2, 0)[:, None])
    assert _distance(got[:, 0], want) < 1e-5
    floats = shard_params(parameters(_model(LATENT)), parallelism)
    here = convert_params(floats, LATENT, parallelism, "float32", arithmetic)
    jax.tree.map(np.testing.assert_array_equal, here, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("config", [LATENT, GROUPED], ids=["latent", "grouped"])
def test_smoothing_changes_no_function_and_calibration_less_than_it_saves(config):
    """An outlier channel, as trained models have: calibrated steps lose less."""
    graph, state = nnx.split(_model(config))
    params = nnx.to_pure_dict(state)
    attention = params["main"]["moe"]["layers"]["attention"]
    if "qkv" in attention:
        attention["norm"]["gain"] = attention["norm"]["gain"].at[:, 3].set(60.0)
    else:
        attention["norm"] = attention["norm"].at[:, 3].set(60.0)
    moe = params["main"]["moe"]["layers"]["moe"]
    moe["norm"]["gain"] = moe["norm"]["gain"].at[:, 5].set(60.0)
    for name in ("experts", "shared"):
        up = moe[name]["gate_up"]["weight"]
        moe[name]["gate_up"]["weight"] = up.at[..., 5, :].divide(60.0)
    model = assemble(graph, params)
    exact = _logits(model, TOKENS)
    moved, _ = smooth(params, input_statistics(graph, params, TOKENS), _of("w8a8"))
    same = assemble(graph, moved)
    assert _distance(_logits(same, TOKENS), exact) < 1e-5
    plain = model.with_arithmetic(_of("float32", experts="w8a8", dense="w8a8"))
    tuned = model.with_arithmetic(_of("float32", experts="w8a8", dense="w8a8"), calibration=TOKENS)
    assert _distance(_logits(tuned, TOKENS), exact) < _distance(_logits(plain, TOKENS), exact)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: _of(experts="int4"),
            "experts must be one of float32, .* got 'int4'",
        ),
        (lambda: _of(kv_cache="fp8"), "kv_cache must be one of"),
        (lambda: _of(attention="flash"), "attention must be one of exact, pasa_fp16"),
        (lambda: _model(LATENT).with_arithmetic("w4a4"), "one of float32, .* got 'w4a4'"),
        (
            lambda: _model(LATENT).with_arithmetic("int8").with_arithmetic("bfloat16"),
            "rounded already; convert the float model",
        ),
        (
            lambda: ARITHMETICS["msd_w4a16"].check(tiny()),
            "blocks of 32 do not divide the model's q_lora_rank, 24",
        ),
        (
            lambda: _model(LATENT).with_arithmetic("int8", calibration=TOKENS + 400),
            "the vocabulary from 0 to 319",
        ),
        (
            lambda: _model(LATENT).with_arithmetic("int8", calibration=TOKENS[0]),
            r"expected integers \[sequences, length\]",
        ),
    ],
)
def test_bad_input_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
