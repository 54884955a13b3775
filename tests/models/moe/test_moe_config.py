"""Model sizes: presets, both Hugging Face layouts, and errors that name file and key."""

import dataclasses
import json
from pathlib import Path

import pytest

from cmjax.models.moe.checkpoint.hf_config import (
    config_json,
    load_config,
    parse_config,
    read_config,
)
from cmjax.models.moe.config import GroupedAttention, LatentAttention
from cmjax.models.moe.positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnConfig,
)
from cmjax.models.moe.presets import deepseek_r1, deepseek_v3, glm_4_7, tiny

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
    assert (plain.layers, plain.routed_experts, plain.heads, plain.rope.scaling) == (3, 16, 4, None)
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
        ({"model_type": "gpt2"}, "model_type must be one of deepseek_v2, .* got 'gpt2'"),
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
        ({"routed_experts": 15}, "multiple of expert_groups, got 15 and 4"),
        ({"groups_per_token": 5}, r"must lie in 1..4 \(expert_groups\), got 5"),
        ({"experts_per_token": 9}, "must lie in 1..8"),
        ({"dense_layers": (3,)}, r"ascending layer numbers in 0..2, got \(3,\)"),
        (
            {"attention": dataclasses.replace(tiny().attention, qk_rope_dim=7)},
            "must be even, got 7",
        ),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(), **changes)


QWEN3 = {  # the form of Qwen3-30B-A3B's own config.json
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "eos_token_id": 151645,
}


def _parsed(base, **changes):
    return parse_config(base | changes, Path("config.json"))


def test_qwen3_reads_as_grouped_attention_and_softmax_routing():
    config = _parsed(QWEN3)
    assert config.attention == GroupedAttention(kv_heads=4, head_dim=128, qk_norm=True)
    assert (config.routed_experts, config.experts_per_token, config.shared_experts) == (128, 8, 0)
    assert (config.scoring, config.score_bias, config.normalize_weights) == ("softmax", False, True)
    assert (config.rope.theta, config.rope.interleave) == (1e6, False)
    assert (config.dense_layers, config.end_tokens) == ((), (151645,))
    transformers_5 = {k: v for k, v in QWEN3.items() if k != "num_experts"}
    assert _parsed(transformers_5, num_local_experts=128) == config


GLM = {  # the form of GLM-4.7's own config.json
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "hidden_size": 5120,
    "num_hidden_layers": 92,
    "first_k_dense_replace": 3,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 202752,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "eos_token_id": [151329, 151336, 151338],
}


def test_glm_reads_as_the_preset_with_half_of_each_head_rotated():
    config = _parsed(GLM)
    assert config == glm_4_7()
    assert (config.rope_dim, config.attention.qk_dim) == (64, 128)
    rope = {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.5}
    old = ("rope_theta", "rope_scaling", "partial_rotary_factor")
    transformers_5 = {key: value for key, value in GLM.items() if key not in old}
    assert _parsed(transformers_5, rope_parameters=rope) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rotary_factor": 0}, "'partial_rotary_factor' must be more than 0, got 0"),
        ({"partial_rotary_factor": 1.5}, "'partial_rotary_factor' must be at most 1, got 1.5"),
        ({"partial_rotary_factor": "0.5"}, "'partial_rotary_factor' must be a number, got '0.5'"),
        ({"partial_rotary_factor": 0.2}, r"must be even, got 25 \(rope.fraction 0.2 of 128\)"),
        ({"partial_rotary_factor": 0.001}, "must be even, got 0 .*; 2 to 128 would do"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": -1}},
            "'partial_rotary_factor' must be more than 0, got -1",
        ),
        ({"n_shared_experts": None}, "'n_shared_experts' must be a number, got None"),
        ({"use_qk_norm": 1}, "'use_qk_norm' must be true or false, got 1"),
    ],
)
def test_a_glm_with_a_wrong_value_is_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        _parsed(GLM, **changes)
    assert str(error.value).startswith("config.json: ")


@pytest.mark.parametrize(
    "change",
    [
        {"attention": dataclasses.replace(glm_4_7().attention, out_bias=True)},
        {"dense_layers": (1,)},
        {"ffn_bias": True},
    ],
)
def test_what_a_glm_cannot_say_is_not_written(change):
    with pytest.raises(ValueError, match=f"glm4_moe config.json cannot say {next(iter(change))}"):
        config_json(dataclasses.replace(glm_4_7(), **change))


def test_another_family_cannot_say_that_a_part_of_a_head_is_rotated():
    with pytest.raises(ValueError, match=r"deepseek_v3 config\.json cannot say rope"):
        config_json(dataclasses.replace(tiny(), rope=Rope(fraction=0.5)))


def test_layers_may_be_dense_at_any_place():
    config = _parsed(QWEN3, num_hidden_layers=7, decoder_sparse_step=2, mlp_only_layers=[1])
    assert config.dense_layers == (0, 1, 2, 4, 6)
    assert config.runs == (
        ("dense", range(3)),
        ("moe", range(1)),
        ("dense", range(3, 4)),
        ("moe", range(1, 2)),
        ("dense", range(4, 5)),
    )
    assert tiny().runs == (("dense", range(1)), ("moe", range(2)))


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 8}, None),
        ({"sliding_window": 8, "use_sliding_window": True}, 8),
        ({"model_type": "mixtral", "sliding_window": 8}, 8),
    ],
)
def test_a_window_counts_where_the_family_uses_it(changes, window):
    attention = _parsed(QWEN3, **changes).attention
    assert isinstance(attention, GroupedAttention)
    assert attention.window == window


def test_mixtral_has_heads_of_the_default_width_and_experts_of_the_dense_size():
    config = _parsed(QWEN3, model_type="mixtral", head_dim=None, num_key_value_heads=None)
    assert config.attention == GroupedAttention(kv_heads=32, head_dim=64)
    assert config.expert_ffn_size == 6144
    assert config.normalize_weights


@pytest.mark.parametrize(
    ("changes", "groups", "best"),
    [
        ({"topk_method": "greedy", "n_group": None, "topk_group": None}, (1, 1), 1),
        ({"topk_method": "group_limited_greedy"}, (8, 4), 1),
    ],
)
def test_deepseek_v2_routes_by_softmax_with_or_without_groups(changes, groups, best):
    config = _parsed(PUBLISHED, model_type="deepseek_v2", scoring_func="softmax", **changes)
    assert (config.expert_groups, config.groups_per_token) == groups
    assert (config.scoring, config.group_best, config.normalize_weights) == ("softmax", best, False)
    assert config.mtp_layers == 0


def test_missing_extras_have_the_values_that_mean_nothing():
    config = _parsed(PUBLISHED, n_shared_experts=None, q_lora_rank=None, eos_token_id=[1, 2])
    assert config.shared_experts == 0
    assert isinstance(config.attention, LatentAttention)
    assert config.attention.q_lora_rank is None
    assert config.end_tokens == (1, 2)
    assert _parsed(PUBLISHED, model_type="kimi_k2").family == "deepseek_v3"


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (PUBLISHED, {"scoring_func": "softmax"}, "'scoring_func' must be 'sigmoid' here"),
        (PUBLISHED, {"moe_layer_freq": 2}, "'moe_layer_freq' must be 1 here, got 2"),
        (PUBLISHED, {"hidden_act": "gelu"}, "'hidden_act' must be 'silu' here, got 'gelu'"),
        (PUBLISHED, {"topk_method": "greedy"}, "'topk_method' must be 'noaux_tc'"),
        (QWEN3, {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' must be 1"),
        (QWEN3, {"num_key_value_heads": 5}, "multiple of attention.kv_heads, got 32 and 5"),
        (QWEN3, {"decoder_sparse_step": 0}, "'decoder_sparse_step' must be at least 1"),
        (QWEN3, {"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false, got 1"),
        (QWEN3, {"eos_token_id": "end"}, "'eos_token_id' must hold token numbers, got 'end'"),
        (QWEN3, {"sliding_window": 0, "use_sliding_window": True}, "window must be at least 1"),
        (QWEN3, {"rope_scaling": "yarn"}, "'rope_parameters' must be an object, got 'yarn'"),
    ],
)
def test_what_this_model_does_not_compute_is_refused(base, changes, message):
    with pytest.raises(ValueError, match=message):
        _parsed(base, **changes)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(factor=2.0),
        DynamicScaling(factor=2.0),
        Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
        ),
        YarnConfig(factor=4.0, original_max_position=64, attention_factor=1.2, truncate=False),
        YarnConfig(factor=4.0, original_max_position=64, mscale=0.7, mscale_all_dim=0.7),
    ],
)
def test_every_rotary_scaling_survives_being_written(scaling):
    config = dataclasses.replace(tiny(), rope=Rope(theta=5e5, scaling=scaling))
    assert parse_config(json.loads(json.dumps(config_json(config))), Path("c")) == config
