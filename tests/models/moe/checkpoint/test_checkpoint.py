"""Checkpoints: what is loaded, what is written back, and what is refused."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.mesh import RankMesh
from cmjax.models.moe.checkpoint.hf_config import config_json, parse_config, read_config
from cmjax.models.moe.checkpoint.load import load, load_params, open_checkpoint
from cmjax.models.moe.checkpoint.safetensor_file import TensorSpec, list_tensors, write_tensors
from cmjax.models.moe.checkpoint.save import save
from cmjax.models.moe.checkpoint.tensor_names import weight_mappings
from cmjax.models.moe.config import GroupedAttention, LatentAttention, MoEConfig, dense_config
from cmjax.models.moe.layered import split_layers
from cmjax.models.moe.layers.linear import quantize_params
from cmjax.models.moe.model import abstract_model, assemble, parameters
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.sharding import shard_params
from cmjax.models.moe.slots import SlotTable, ep_table
from cmjax.models.moe.steps import abstract_params

SMALL = MoEConfig(
    vocab_size=20,
    hidden_size=8,
    layers=3,
    dense_layers=(0,),
    heads=4,
    attention=LatentAttention(
        q_lora_rank=6, kv_lora_rank=4, qk_nope_dim=4, qk_rope_dim=2, v_dim=6, bias=True
    ),
    ffn_size=12,
    expert_ffn_size=6,
    routed_experts=4,
    shared_experts=1,
    experts_per_token=2,
    expert_groups=2,
    groups_per_token=1,
    routed_scale=2.5,
    max_position=64,
    mtp_layers=1,
    end_tokens=(1, 2),
)
SIZES = {
    "vocab_size": 20, "hidden_size": 8, "layers": 3, "heads": 4, "ffn_size": 12,
    "max_position": 64, "rope": dataclasses.replace(SMALL.rope, interleave=False),
}  # fmt: skip
FAMILIES = {
    "deepseek_v3": SMALL,
    "deepseek_v2": dataclasses.replace(
        SMALL,
        family="deepseek_v2",
        scoring="softmax",
        score_bias=False,
        group_best=1,
        normalize_weights=False,
        attention=dataclasses.replace(SMALL.attention, q_lora_rank=None),
        shared_experts=2,
        ffn_bias=True,
        mtp_layers=0,
    ),
    "glm4_moe": dataclasses.replace(
        SMALL,
        family="glm4_moe",
        attention=GroupedAttention(kv_heads=2, head_dim=12, qk_norm=True, bias=True),
        rope=dataclasses.replace(SMALL.rope, fraction=0.5, interleave=False),
    ),
    "qwen3_moe": dataclasses.replace(
        SMALL,
        family="qwen3_moe",
        scoring="softmax",
        score_bias=False,
        group_best=1,
        expert_groups=1,
        routed_scale=1.0,
        dense_layers=(1,),
        attention=GroupedAttention(
            kv_heads=2, head_dim=6, qk_norm=True, bias=True, out_bias=True, window=5
        ),
        shared_experts=0,
        mtp_layers=0,
        rope=dataclasses.replace(SMALL.rope, interleave=False),
    ),
    "mixtral": dataclasses.replace(
        SMALL,
        family="mixtral",
        scoring="softmax",
        score_bias=False,
        group_best=1,
        expert_groups=1,
        routed_scale=1.0,
        dense_layers=(),
        attention=GroupedAttention(kv_heads=1, head_dim=4),
        ffn_size=6,
        shared_experts=0,
        mtp_layers=0,
        tie_embeddings=True,
        rope=dataclasses.replace(SMALL.rope, interleave=False),
    ),
    "qwen3": dense_config(
        **SIZES, attention=GroupedAttention(kv_heads=2, head_dim=6, qk_norm=True), family="qwen3"
    ),
    "llama": dense_config(
        **SIZES,
        attention=GroupedAttention(kv_heads=1, head_dim=4, bias=True, out_bias=True),
        ffn_bias=True,
        family="llama",
    ),
}


def _random(config, precision="float32", seed=0):
    """A model whose every parameter, biases and gains too, is random."""
    mtp = config.mtp_layers > 0
    graph, shapes = abstract_model(config, one_rank(config), precision, mtp=mtp)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            name = path[-1].key
            slots, copies = one_rank(config).table.arrays()
            return jnp.broadcast_to(slots if name == "slots_of_expert" else copies, leaf.shape)
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return assemble(graph, jax.tree_util.tree_map_with_path(draw, shapes))


def _same(got, want):
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_as_the_same_model(tmp_path, family):
    model = _random(FAMILIES[family])
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    _same(parameters(again), parameters(model))


def test_a_model_of_dense_layers_only_is_saved_and_loaded(tmp_path):
    config = dataclasses.replace(FAMILIES["qwen3_moe"], dense_layers=(0, 1, 2))
    model = _random(config)
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.main.moe is None
    _same(parameters(again), parameters(model))
    tokens = np.arange(6, dtype=np.int32)[None]
    np.testing.assert_array_equal(again(tokens), model(tokens))


def test_shards_with_an_index_hold_the_same_model(tmp_path):
    model = _random(SMALL, "bfloat16")
    save(model, tmp_path, most_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [sum(t.nbytes for t in list_tensors(tmp_path / file).values()) for file in files]
    assert max(sizes) <= 2000
    assert sum(sizes) == index["metadata"]["total_size"]
    _same(parameters(load(tmp_path, precision="bfloat16")), parameters(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_survives_being_written(family, tmp_path):
    config = FAMILIES[family]
    assert parse_config(json.loads(json.dumps(config_json(config))), tmp_path) == config


def test_fixtures_are_written_back_value_for_value(data, tmp_path):
    folders = sorted((data / "hf_fixtures").glob("*_tiny"))
    assert folders
    for folder in folders:
        out = tmp_path / folder.name
        save(load(folder), out)
        want, got = (list_tensors(place / "model.safetensors") for place in (folder, out))
        assert set(got) == set(want)
        for name in want:
            np.testing.assert_array_equal(got[name].read(), want[name].read())
        assert read_config(out) == read_config(folder)


def test_block_fp8_is_loaded_as_its_values(tmp_path):
    model = _random(SMALL)
    save(model, tmp_path, dtype="float8")
    stored = list_tensors(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    q, scale = stored[name].read(), stored[name + "_scale_inv"].read()
    assert (q.dtype.name, scale.shape) == ("float8_e4m3fn", (1, 1))
    assert stored["model.layers.1.mlp.gate.weight"].dtype.name == "bfloat16"
    got = parameters(load(tmp_path))["main"]["moe"]["layers"]["moe"]["experts"]["gate_up"]["weight"]
    np.testing.assert_allclose(got[0, 3, :, 6:], (q.astype(np.float32) * scale).T, rtol=1e-6)
    original = parameters(model)["main"]["moe"]["layers"]["moe"]["experts"]["gate_up"]["weight"]
    assert 0 < float(jnp.abs(got - original).max() / jnp.abs(original).max()) < 1 / 16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_hold_rounded_values(tmp_path, dtype):
    model = _random(SMALL)
    save(model, tmp_path, dtype=dtype)
    got, want = parameters(load(tmp_path)), parameters(model)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), want)
    for key in ("main", "moe", "layers", "moe", "router"):
        got, want, rounded = got[key], want[key], rounded[key]
    np.testing.assert_array_equal(got["weight"], rounded["weight"])
    np.testing.assert_array_equal(got["bias"], want["bias"])  # stays float32


WHOLE_BLOCKS = dataclasses.replace(  # of the formats that share a scale among 32 values
    SMALL,
    hidden_size=32,
    heads=8,
    attention=dataclasses.replace(SMALL.attention, q_lora_rank=32, v_dim=4, bias=False),
    ffn_size=64,
    expert_ffn_size=32,
)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["int8", "msd_w8a16", "msd_w4a16", "w4a8"])
def test_weights_are_rounded_as_they_are_read_like_those_of_the_float_model(tmp_path, arithmetic):
    model = _random(WHOLE_BLOCKS)
    save(model, tmp_path)
    like = abstract_params(WHOLE_BLOCKS, one_rank(WHOLE_BLOCKS), arithmetic, mtp=True)
    want = quantize_params(parameters(model), like)
    _same(parameters(load(tmp_path, precision=arithmetic)), want)


@pytest.mark.parametrize("arithmetic", ["float32", "msd_w4a16"])
def test_layers_are_read_into_arrays_of_their_own(tmp_path, arithmetic):
    save(_random(WHOLE_BLOCKS), tmp_path)
    checkpoint, parallelism = open_checkpoint(tmp_path), one_rank(WHOLE_BLOCKS)
    options = {"precision": arithmetic, "mtp": True, "mesh": RankMesh(1, 1)}
    read = functools.partial(load_params, checkpoint, parallelism, **options)
    _same(read(split=True), split_layers(read(), parallelism))


MESH = RankMesh(2, 2)
PARALLELISMS = {
    "redundant": Parallelism(table=ep_table(4, 4, redundant=4), axes=MESH.axes),
    "shared in slots": Parallelism(table=ep_table(4, 4, 2, shared_replicas=2), axes=MESH.axes),
    "heads split": Parallelism(table=ep_table(4, 4), axes=MESH.axes, sequence_parallel=True),
}


@pytest.mark.parametrize(
    ("parallelism", "precision"),
    [
        ("redundant", "float32"),
        ("redundant", "msd_w8a16"),
        ("shared in slots", "int8"),
        ("heads split", "float32"),
    ],
)
def test_tensors_go_where_sharding_the_whole_model_puts_them(tmp_path, parallelism, precision):
    parallelism = PARALLELISMS[parallelism]
    config = dataclasses.replace(SMALL, attention=dataclasses.replace(SMALL.attention, bias=False))
    save(_random(config), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    options = {"precision": precision, "mtp": True}
    whole = load_params(checkpoint, one_rank(config), **options)
    tables = None
    if not parallelism.table.has_shared and not parallelism.sequence_parallel:
        order = np.random.default_rng(0).permutation
        tables = [
            SlotTable(tuple(order(parallelism.table.experts_of_slot)), 4, 4) for _ in range(3)
        ]
    want = shard_params(whole, parallelism, tables)
    got = load_params(checkpoint, parallelism, mesh=MESH, tables=tables, **options)
    down = got["main"]["moe"]["layers"]["moe"]["experts"]["down"]
    experts = down.get("weight", down.get("values"))
    assert [s.data.shape[0] for s in experts.addressable_shards] == [2, 2]
    _same(got, want)


def test_mtp_weights_are_loaded_if_there_or_if_asked_for(data, tmp_path):
    save(_random(SMALL), tmp_path)
    assert load(tmp_path).mtp is not None
    assert load(tmp_path, mtp=False).mtp is None
    without = data / "hf_fixtures" / "deepseek_v3_tiny"  # its config.json names a module
    assert load(without).mtp is None
    with pytest.raises(ValueError, match=r"no multi-token-prediction weights \('model.layers.3.eh"):
        load(without, mtp=True)


def _rewrite(folder, change):
    """A checkpoint with other tensors: `change` gets and gives name -> array."""
    stored = {name: t.read() for name, t in list_tensors(folder / "model.safetensors").items()}
    tensors = change(stored)
    specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / "model.safetensors", specs, tensors.items())


def _without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate.weight"
DAMAGES = {
    "missing": (
        lambda folder: _rewrite(folder, _without(NORM)),
        r"1 of \d+ tensors of this deepseek_v3 model are missing: model.norm.weight",
    ),
    "unknown": (
        lambda folder: _rewrite(folder, lambda t: t | {"visual.patch": t[NORM]}),
        "1 tensors have no place in the deepseek_v3 model .*: visual.patch",
    ),
    "wrong shape": (
        lambda folder: _rewrite(folder, lambda t: t | {GATE: t[GATE][:3]}),
        r"'model.layers.1.mlp.gate.weight' has shape \[3, 8\], config.json makes it \[4, 8\]",
    ),
    "integers": (
        lambda folder: _rewrite(folder, lambda t: t | {GATE: t[GATE].astype(np.int32)}),
        "has type int32; weights are float64, float32",
    ),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-100]
        ),
        r"truncated: tensor .* ends at byte [\d,]+, the file has [\d,]+",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"no \.safetensors file in this folder",
    ),
    "other architecture": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
        "model_type must be one of deepseek_v2, .* got 'gpt2'",
    ),
    "other quantization": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps(config_json(SMALL) | {"quantization_config": {"quant_method": "awq"}})
        ),
        "quant_method 'awq'; this reader knows 'fp8'",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_anything_is_read(tmp_path, damage):
    folder = tmp_path / "checkpoint"
    save(_random(SMALL), folder)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_fp8_without_its_scales_or_with_others_is_refused(tmp_path):
    save(_random(SMALL), tmp_path, dtype="float8")
    name = "model.layers.0.mlp.up_proj.weight"
    scale = name + "_scale_inv"
    _rewrite(tmp_path, lambda t: t | {scale: np.ones((2, 1), np.float32)})
    with pytest.raises(ValueError, match=r"has shape \[2, 1\]; blocks of 128 x 128 of \[12, 8\]"):
        load(tmp_path)
    _rewrite(tmp_path, _without(scale))
    with pytest.raises(ValueError, match=f"{name}' of shape .* needs block scales '{scale}'"):
        load(tmp_path)


def test_a_missing_shard_and_a_lying_index_are_named(tmp_path):
    save(_random(SMALL), tmp_path, most_bytes=4000)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first = sorted(set(raw["weight_map"].values()))[0]
    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {"no.such": first}}))
    with pytest.raises(ValueError, match=r"1 tensors are not in the shards .*: no\.such"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": raw["weight_map"]}))
    (tmp_path / first).unlink()
    with pytest.raises(ValueError, match=f"1 of .* shards .* are missing: {first}"):
        load(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="no 'weight_map'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"dtype": "fp4"}, "dtype must be one of float32, .* got 'fp4'"),
        ({"routed_scale": 2.0, "family": "mixtral"}, {}, "config.json"),
        ({"dense_layers": (1,)}, {}, r"cannot say dense_layers = \(1,\); it would read \(0,\)"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, change, options, message):
    model = _random(dataclasses.replace(SMALL, **change))
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_int8_models_and_used_folders_are_not_written(tmp_path):
    save(_random(SMALL), tmp_path)
    with pytest.raises(ValueError, match="few-bit weights holds rounded ones"):
        save(load(tmp_path, precision="int8"), tmp_path / "new")
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        save(_random(SMALL), tmp_path)


def test_every_parameter_is_some_tensors_and_no_two_tensors_overlap():
    for config in FAMILIES.values():
        mtp = config.mtp_layers > 0
        shapes = abstract_params(config, one_rank(config), "float32", mtp=mtp)
        held = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        placed = [] if config.dense else [shapes["main"]["moe"]]
        placed += [shapes["mtp"]["stack"]] if mtp else []
        tables = sum(
            int(np.prod(stack["layers"]["moe"][name].shape))
            for stack in placed
            for name in ("slots_of_expert", "copies")
        )
        listed = list(weight_mappings(config, mtp=mtp))
        assert sum(int(np.prod(mapping.shape)) for mapping in listed) == held - tables
        assert len({mapping.name for mapping in listed}) == len(listed)


def test_a_loaded_model_is_an_nnx_module(data):
    model = load(data / "hf_fixtures" / "mixtral_tiny")
    assert isinstance(model, nnx.Module)
    assert model(jnp.zeros((2, 3), jnp.int32)).shape == (2, 3, 320)
