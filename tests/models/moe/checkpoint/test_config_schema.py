"""What every key of a config.json means where it is absent, null or absurd: held against the
config classes of transformers, key by key."""

import json
import math
from pathlib import Path

import pytest

from cmjax.models.moe.checkpoint.hf_config import FAMILIES, parse_config, read_config
from cmjax.models.moe.config import GroupedAttention, LatentAttention
from cmjax.models.moe.presets import qwen3_8b, qwen3_30b_a3b

CLASSES = {
    "deepseek_v2": "DeepseekV2Config",
    "deepseek_v3": "DeepseekV3Config",
    "glm4_moe": "Glm4MoeConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
    "qwen3": "Qwen3Config",
    "llama": "LlamaConfig",
}
ESSENTIAL = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4_moe": {"num_attention_heads": 64},  # of its own 96 a head is 42 wide, and a half is odd
}
"""What a class leaves open, or says wrong, and its model cannot do without."""
CHANGES_NOTHING = """
    architectures attention_dropout bos_token_id chunk_size_feed_forward dtype id2label
    initializer_range is_encoder_decoder label2id model_type output_attentions
    output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type return_dict
    router_aux_loss_coef router_jitter_noise transformers_version use_cache _name_or_path
""".split()
"""Of training, of other heads, or of how transformers runs."""
DERIVED = {
    "deepseek_v2": ["head_dim", "qk_head_dim", "num_key_value_heads", "norm_topk_prob"],
    "deepseek_v3": ["head_dim", "qk_head_dim", "num_key_value_heads"],
    "qwen3": ["sliding_window", "max_window_layers"],
}
"""Follow from keys that are read, or mean nothing without one that is refused; transformers'
DeepSeek-V2 never looks at `norm_topk_prob`."""
PATH = Path("config.json")


def _peer(family):
    """The class of transformers, and everything it says of a model where nobody says anything."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'peers')")
    peer = getattr(transformers, CLASSES[family])
    return peer, peer(**ESSENTIAL.get(family, {})).to_dict()


def _read(family):
    return {*FAMILIES[family].schema.__struct_fields__, "rope_parameters"}


@pytest.mark.parametrize("family", CLASSES)
def test_an_absent_key_is_transformers_default_or_is_refused(family):
    _, whole = _peer(family)
    whole = json.loads(json.dumps(whole))
    if family == "qwen3_moe":
        whole |= {"use_sliding_window": True, "sliding_window": 4096}  # else it has no meaning
    want = parse_config(whole, PATH)
    taken = []
    for key in sorted(_read(family)):
        without = {name: value for name, value in whole.items() if name != key}
        try:
            got = parse_config(without, PATH)
        except ValueError as error:
            assert "is missing" in str(error) or "rope_theta" in str(error), key
            continue
        if key == "use_sliding_window":
            assert isinstance(got.attention, GroupedAttention)
            assert got.attention.window is None  # the class's own default is False
            continue
        assert got == want, key
        taken.append(key)
    assert {"rms_norm_eps", "tie_word_embeddings", "eos_token_id", "hidden_act"} <= set(taken)


@pytest.mark.parametrize("family", CLASSES)
def test_every_key_of_the_class_is_read_or_known_to_change_nothing(family):
    _, whole = _peer(family)
    known = {*CHANGES_NOTHING, *DERIVED.get(family, []), *_read(family)}
    known |= set(FAMILIES[family].schema.aliases)
    assert set(whole) - known == set()


@pytest.mark.parametrize("family", CLASSES)
def test_what_is_read_is_what_the_class_says(family):
    peer, whole = _peer(family)
    theirs, ours = peer(**ESSENTIAL.get(family, {})), parse_config(whole, PATH)
    attention = ours.attention
    pairs = {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.hidden_size,
        "num_hidden_layers": ours.layers,
        "num_attention_heads": ours.heads,
        "intermediate_size": ours.ffn_size,
        "num_experts": ours.routed_experts,
        "num_local_experts": ours.routed_experts,
        "n_routed_experts": ours.routed_experts,
        "num_experts_per_tok": ours.experts_per_token,
        "max_position_embeddings": ours.max_position,
        "rms_norm_eps": ours.norm_eps,
        "routed_scaling_factor": ours.routed_scale,
        "norm_topk_prob": ours.normalize_weights,
        "first_k_dense_replace": len(ours.dense_layers),
        "n_shared_experts": ours.shared_experts,
        "num_mtp_layers": ours.mtp_layers,
        "n_group": ours.expert_groups,
        "topk_group": ours.groups_per_token,
        "rope_interleave": ours.rope.interleave,
        "attention_bias": attention.bias,
        "use_qk_norm": isinstance(attention, GroupedAttention) and attention.qk_norm,
        "tie_word_embeddings": ours.tie_embeddings,
        "moe_intermediate_size": ours.expert_ffn_size,
    }
    if isinstance(attention, LatentAttention):
        pairs |= {
            "q_lora_rank": attention.q_lora_rank,
            "kv_lora_rank": attention.kv_lora_rank,
            "qk_nope_head_dim": attention.qk_nope_dim,
            "qk_rope_head_dim": attention.qk_rope_dim,
            "v_head_dim": attention.v_dim,
        }
    else:
        pairs |= {"num_key_value_heads": attention.kv_heads, "sliding_window": attention.window}
    if family == "deepseek_v2":  # null there: one group
        pairs |= {"n_group": None, "topk_group": None}
    compared = {key: value for key, value in pairs.items() if hasattr(theirs, key)}
    assert compared == {key: getattr(theirs, key) for key in compared}
    assert len(compared) >= (10 if ours.dense else 12)
    ends = theirs.eos_token_id
    assert ours.end_tokens == (() if ends is None else (ends,))
    rope = theirs.rope_parameters
    assert ours.rope.theta == rope["rope_theta"]
    assert ours.rope.fraction == rope.get("partial_rotary_factor", 1)


def test_mixtral_without_an_epsilon_has_its_own(data, tmp_path):
    raw = json.loads((data / "hf_fixtures" / "mixtral_tiny" / "config.json").read_text())
    del raw["rms_norm_eps"]
    assert parse_config(raw, PATH).norm_eps == 1e-5
    raw = json.loads((data / "hf_fixtures" / "qwen3_moe_tiny" / "config.json").read_text())
    del raw["rms_norm_eps"]
    assert parse_config(raw, PATH).norm_eps == 1e-6


def test_every_published_config_is_read_or_refused_by_its_family(data):
    read = {}
    for file in sorted((data / "model_configs" / "aiconfigurator").glob("*.json")):
        try:
            read[file.name.split("--")[1].removesuffix("_config.json")] = read_config(file)
        except ValueError as error:
            assert "model_type must be one of" in str(error)
    assert set(read) == {
        "DeepSeek-R1", "DeepSeek-V3", "Kimi-K2-Instruct", "Qwen3-235B-A22B", "Qwen3-30B-A3B",
        "Qwen3-Coder-480B-A35B-Instruct", "Qwen3-8B", "Qwen3-32B",
    }  # fmt: skip
    assert read["Qwen3-30B-A3B"] == qwen3_30b_a3b()
    assert read["Qwen3-8B"] == qwen3_8b()
    assert read["Kimi-K2-Instruct"].mtp_layers == 0
    assert read["DeepSeek-R1"].end_tokens == (1,)


KIMI_DECIDES = ["routed_scaling_factor", "n_group", "first_k_dense_replace", "rms_norm_eps"]


@pytest.mark.parametrize("key", KIMI_DECIDES)
def test_nothing_is_assumed_of_a_class_that_lies_beside_its_weights(data, key):
    folder = data / "model_configs" / "aiconfigurator"
    raw = json.loads((folder / "moonshotai--Kimi-K2-Instruct_config.json").read_text())
    del raw[key]
    with pytest.raises(ValueError, match=f"key '{key}' is missing"):
        parse_config(raw, PATH)


MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rope_theta": 1e6,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
HUGE = 10**400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 0}, "'rope_theta' must be more than 1, got 0"),
        ({"rope_theta": -1.0}, "'rope_theta' must be more than 1, got -1.0"),
        ({"rope_theta": math.nan}, "'rope_theta' must be more than 1, got nan"),
        ({"rope_theta": math.inf}, "'rope_theta' must be at most 1e\\+30, got inf"),
        ({"rope_theta": None}, "'rope_theta' must be a number, got None"),
        ({"rms_norm_eps": -1}, "'rms_norm_eps' must be at least 0, got -1"),
        ({"rms_norm_eps": math.nan}, "'rms_norm_eps' must be .*, got nan"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' must be a number, got None"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' must be a number, got '1e-5'"),
        ({"vocab_size": HUGE}, "'vocab_size' must be at most 2147483647, got 1000"),
        ({"vocab_size": 0}, "'vocab_size' must be at least 1, got 0"),
        ({"rms_norm_eps": HUGE}, "'rms_norm_eps' must be a smaller number, got 1000"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' must be at most 10000, got 10000"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' must be a number, got True"),
        ({"num_local_experts": -3}, "'num_local_experts' must be at least 1, got -3"),
        ({"num_experts": 5}, "'num_local_experts' and 'num_experts' .* disagree: 4 and 5"),
        ({"head_dim": []}, r"'head_dim' must be a number, got \[\]"),
        ({"model_type": ["mixtral"]}, r"model_type must be one of .*, got \['mixtral'\]"),
        ({"hidden_act": "gelu"}, "'hidden_act' must be 'silu' here, got 'gelu'"),
        ({"eos_token_id": [1, -2]}, r"'eos_token_id' must hold token numbers, got \[1, -2\]"),
        ({"sliding_window": -4}, "window must be at least 1"),
        ({"rope_scaling": YARN | {"factor": 0}}, "rope_scaling: key 'factor' must be more than 0"),
        ({"rope_scaling": YARN | {"factor": math.nan}}, "'factor' must be more than 0, got nan"),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "'beta_fast' must be at least 0, got -1"),
        ({"rope_scaling": YARN | {"truncate": None}}, "'truncate' must be true or false, got None"),
        ({"rope_scaling": YARN | {"rope_type": None}}, "'rope_type' must be 'default', .* None"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4,
                              "high_freq_factor": 4}},
            "'high_freq_factor' must be more than low_freq_factor 4, got 4",
        ),
        ({"rope_scaling": {"full": {"rope_theta": 1e4}}}, "per kind of layer \\('full'\\)"),
        ({"original_max_position_embeddings": None, "rope_scaling": YARN},
         "'original_max_position_embeddings' must be a number, got None"),
    ],
)  # fmt: skip
def test_a_value_no_model_can_have_is_refused_with_its_key(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_config(MIXTRAL | changes, PATH)
    assert str(error.value).startswith("config.json: ")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not valid JSON .*nested too deeply"),
        ('{"vocab_size": 1, "vocab_size": 2}', "named twice: vocab_size"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("null", "must hold a JSON object, got NoneType"),
    ],
)
def test_a_file_that_holds_no_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL), encoding="utf-8-sig")
    assert read_config(tmp_path) == parse_config(MIXTRAL, PATH)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"rope_theta": 5e5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7e4},
        {"rope_parameters": YARN | {"rope_theta": 3e4}, "rope_theta": 7e4},
        {"rope_parameters": YARN | {"rope_theta": 3e4}, "original_max_position_embeddings": 32},
        {
            "rope_scaling": YARN,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0},
            "rope_theta": 7e4,
        },
    ],
)
def test_rotary_positions_said_twice_are_read_in_the_order_of_transformers(family, change):
    peer, whole = _peer(family)
    raw = json.loads(json.dumps(whole)) | json.loads(json.dumps(change))
    theirs = peer(**{key: value for key, value in raw.items() if key != "model_type"})
    theirs.standardize_rope_params()
    rope, want = parse_config(raw | change, PATH).rope, theirs.rope_parameters
    assert rope.theta == want["rope_theta"]
    assert rope.fraction == want.get("partial_rotary_factor", 1)
    assert {"YarnConfig": "yarn", "LinearScaling": "linear"}[type(rope.scaling).__name__] == want[
        "rope_type"
    ]
    assert rope.scaling.factor == want["factor"]
    if want["rope_type"] == "yarn":
        assert rope.scaling.original_max_position == want["original_max_position_embeddings"]


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1e6, "rope_parameters": None, "partial_rotary_factor": 0.25},
        {"rope_parameters": {"rope_theta": 3e4, "partial_rotary_factor": 0.75}},
        {"rope_parameters": {"rope_theta": 3e4, "partial_rotary_factor": 0.75},
         "partial_rotary_factor": 0.25},
        {"rope_parameters": {"rope_theta": 3e4}, "partial_rotary_factor": 0.25},
        {"rope_scaling": YARN, "rope_theta": 3e4, "partial_rotary_factor": 0.25},
    ],
)  # fmt: skip
def test_the_rotated_part_of_a_head_is_read_where_transformers_looks_for_it(change):
    peer, whole = _peer("glm4_moe")
    theirs = peer(**json.loads(json.dumps(change)))
    theirs.standardize_rope_params()
    want = theirs.rope_parameters["partial_rotary_factor"]
    assert parse_config(whole | change, PATH).rope.fraction == want


def test_a_base_of_frequencies_that_would_be_dropped_is_refused():
    raw = {key: value for key, value in MIXTRAL.items() if key != "rope_theta"}
    raw |= {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_scaling": YARN}
    with pytest.raises(ValueError, match=r"has rope_theta 500000\.0, but 'rope_scaling' beside it"):
        parse_config(raw, PATH)
    raw["rope_parameters"]["rope_theta"] = 1e6  # what transformers takes for Mixtral
    assert parse_config(raw, PATH).rope.theta == 1e6


def test_a_context_goes_as_far_as_yarn_stretches_it():
    config = parse_config(MIXTRAL | {"max_position_embeddings": 64, "rope_scaling": YARN}, PATH)
    assert (config.max_position, config.context_limit) == (64, 256)
    assert parse_config(MIXTRAL, PATH).context_limit == 256
    assert parse_config(MIXTRAL | {"rope_scaling": YARN | {"factor": 2}}, PATH).context_limit == 256


def test_families_here_are_those_with_a_class():
    assert set(FAMILIES) - set(CLASSES) == {"kimi_k2"}
