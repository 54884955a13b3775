"""Model sizes: presets, both Hugging Face layouts, and errors that name file and key."""

import dataclasses
import json

import pytest

from models.moe.config import YarnConfig, deepseek_r1, deepseek_v3, tiny
from models.moe.hf_config import load_config, read_config

PUBLISHED = {  # the form of DeepSeek-V3's own config.json
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


ODD = dataclasses.replace(tiny().attention, qk_rope_dim=7)


def _written(folder, **changes):
    raw = {key: value for key, value in (PUBLISHED | changes).items() if value is not ...}
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    return path


def test_the_published_layout_reads_as_the_preset(tmp_path):
    assert read_config(_written(tmp_path)) == deepseek_v3() == deepseek_r1()


def test_the_transformers_5_layout_reads_alike(tmp_path):
    rope = PUBLISHED["rope_scaling"] | {"rope_theta": 10000.0, "rope_type": "yarn"}
    path = _written(tmp_path, rope_parameters=rope, rope_theta=..., rope_scaling=...)
    assert read_config(path.parent) == deepseek_v3()


def test_the_fixtures_are_read(data):
    plain = load_config(data / "hf_fixtures" / "deepseek_v3_tiny")
    assert (plain.layers, plain.experts, plain.heads, plain.rope.scaling) == (3, 16, 4, None)
    yarn = load_config(data / "hf_fixtures" / "deepseek_v3_yarn_tiny").rope.scaling
    assert isinstance(yarn, YarnConfig)
    assert (yarn.factor, yarn.original_max_position) == (40, 64)


def test_presets_load_by_name():
    assert load_config("tiny") == tiny()
    assert load_config("deepseek-r1").moe_layers == 58


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_lora_rank": ...}, "config.json: key 'q_lora_rank' is missing"),
        ({"q_lora_rank": "8"}, "config.json: key 'q_lora_rank' must be a number, got '8'"),
        ({"hidden_size": 7.5}, "key 'hidden_size' must be a whole number, got 7.5"),
        ({"model_type": "llama"}, "model_type must be one of deepseek_v2, .* got 'llama'"),
        ({"rope_theta": ...}, "key 'rope_theta' is missing"),
        ({"rope_scaling": {"type": "su"}}, "'rope_type' must be 'default', 'linear',.* got 'su'"),
        ({"rope_scaling": {"type": "yarn"}}, "key 'factor' is missing"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read_config(_written(tmp_path, **changes))
    assert str(tmp_path) in str(error.value)


def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path / "absent.json")


def test_an_unknown_preset_suggests_a_close_one():
    with pytest.raises(ValueError, match=r"'deepseek-r2'.*deepseek-r1.*did you mean 'deepseek-"):
        load_config("deepseek-r2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 15}, "multiple of expert_groups, got 15 and 4"),
        ({"groups_per_token": 5}, r"must lie in 1..4 \(expert_groups\), got 5"),
        ({"experts_per_token": 9}, "must lie in 1..8"),
        ({"dense_layers": (3,)}, r"ascending layer numbers in 0..2, got \(3,\)"),
        ({"dense_layers": (0, 1, 2)}, "all 3 layers are dense"),
        (
            {"attention": dataclasses.replace(tiny().attention, qk_rope_dim=7)},
            "must be even, got 7",
        ),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(), **changes)
