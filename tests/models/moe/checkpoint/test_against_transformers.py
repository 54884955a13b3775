"""Logits against transformers, which reads the same folder: for every form in which the numbers of
a config.json, and the weights, are published."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cmjax.models.moe.checkpoint.load import load, open_checkpoint
from cmjax.models.moe.checkpoint.safetensor_file import TensorSpec, write_tensors
from cmjax.models.moe.config import DENSE

torch = pytest.importorskip("torch", reason="needs torch (extra 'peers')")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'peers')")

GROUPED = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
LATENT = GROUPED | {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
GLM = GROUPED | {
    "n_routed_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "attention_bias": True,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
FAMILIES = {
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4, "head_dim": 8}),
    "qwen3_moe": (
        "Qwen3Moe",
        GROUPED | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "deepseek_v2": ("DeepseekV2", LATENT),
    "deepseek_v3": ("DeepseekV3", LATENT | {"n_group": 2, "topk_group": 1}),
    "glm4_moe": ("Glm4Moe", GLM | {"use_qk_norm": True}),
    "glm4_moe, no norms": ("Glm4Moe", GLM),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "llama": ("Llama", GROUPED | {"mlp_bias": True, "attention_bias": True}),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 40))


def _write(folder, family, **changes):
    """A random model of transformers, as it saves it; then `changes` of its config.json."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    for key, value in model.state_dict().items():
        if key.endswith("e_score_correction_bias"):
            value.copy_(torch.randn(value.shape))
    model.save_pretrained(folder)
    _edit(folder, **changes)
    return model


def _edit(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))


def _theirs(folder, tokens=TOKENS):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def _ours(folder, tokens=TOKENS):
    return np.asarray(load(folder)(tokens.astype(np.int32)))


def _agree(ours, theirs):
    assert np.abs(theirs).max() > 0.5  # a model whose logits say something
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


POSITIONS = {
    "rope_scaling beside rope_parameters": {"rope_scaling": YARN},
    "YaRN with a temperature": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}},
    "YaRN published as null": {
        "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "linear with a temperature": {
        "rope_scaling": {"type": "linear", "factor": 3.0, "mscale_all_dim": 1.0}
    },
    "llama3 with a temperature": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "mscale_all_dim": 1.0,
        }
    },
    "dynamic with a temperature": {
        "rope_scaling": {"type": "dynamic", "factor": 2.0, "mscale_all_dim": 1.0}
    },
    "original length at the top": {
        "rope_scaling": YARN, "original_max_position_embeddings": 32
    },
}  # fmt: skip


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_positions(tmp_path, family, positions):
    if family != "deepseek_v3" and positions == "YaRN published as null":
        pytest.skip("DeepSeek-V3's alone")
    plain = _ours(tmp_path) if _write(tmp_path, family) else None
    change = POSITIONS[positions]
    theta = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_theta"]
    _edit(tmp_path, rope_theta=theta, **change)
    ours = _ours(tmp_path)
    _agree(ours, _theirs(tmp_path))
    latent = family.startswith("deepseek")
    if latent or not positions.startswith("dynamic"):
        assert np.abs(ours - plain).max() > 1e-2  # the scaling does something


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("mixtral", "rms_norm_eps"),
        ("qwen3_moe", "norm_topk_prob"),
        ("deepseek_v3", "routed_scaling_factor"),
        ("glm4_moe, no norms", "use_qk_norm"),
        ("glm4_moe", "rms_norm_eps"),
        ("deepseek_v3", "norm_topk_prob"),
        ("deepseek_v3", "rope_interleave"),
        ("deepseek_v2", "routed_scaling_factor"),
        ("deepseek_v2", "topk_method"),
    ],
)
def test_a_config_without_a_key(tmp_path, family, key):
    _write(tmp_path, family, **{key: ...})
    _agree(_ours(tmp_path), _theirs(tmp_path))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in DENSE])
def test_experts_fused_as_transformers_holds_them(tmp_path, family):
    model = _write(tmp_path, family)
    want = _theirs(tmp_path)
    state = {key: value.contiguous().numpy() for key, value in model.state_dict().items()}
    fused = [key for key in state if key.endswith("experts.gate_up_proj")]
    assert fused
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    _agree(_ours(tmp_path), want)
    name = fused[0]
    save_file(state | {name: state[name][:, :-2].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts.gate_up_proj' has shape .* makes it \[4, "):
        open_checkpoint(tmp_path)


def _quantized(folder, scheme):
    """Store the matrices of experts and attention in 8 bits; gives what they then are."""
    tensors = load_file(folder / "model.safetensors")
    stored, meant = {}, {}
    for name, w in tensors.items():
        meant[name], stored[name] = w, w
        if w.ndim != 2 or ("proj" not in name and ".w" not in name):
            continue
        scale, steps, suffix = scheme(w)
        stored[name], stored[name + suffix] = steps, scale
        rows = scale if scale.ndim == 2 else scale.reshape(-1, 1)
        meant[name] = steps.astype(np.float32) * rows.astype(np.float32)
        if suffix == "_scale":
            stored[name.removesuffix("weight") + "input_scale"] = np.ones(1, np.float32)
    save_file(meant, folder / "model.safetensors", {"format": "pt"})
    return stored


def _fp8_tensor(suffix, shape):
    def scheme(w):
        scale = np.full(shape, np.abs(w).max() / 448, np.float32)
        return scale, (w / scale.reshape(-1)[0]).astype(ml_dtypes.float8_e4m3fn), suffix

    return scheme


def _int8_rows(w):
    scale = (np.abs(w).max(1, keepdims=True) / 127).astype(ml_dtypes.bfloat16)
    steps = np.clip(np.round(w / scale.astype(np.float32)), -127, 127)
    return scale, steps.astype(np.int8), "_scale"


def _fp8_rows(w):
    scale = np.abs(w).max(1, keepdims=True) / 448
    return scale, (w / scale).astype(ml_dtypes.float8_e4m3fn), "_scale"


def _compressed(kind, strategy):
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


FORMATS = {
    "FP8 per tensor, transformers": (
        _fp8_tensor("_scale_inv", ()), {"quant_method": "fp8", "weight_block_size": None},
    ),
    "FP8 per tensor, static activations": (
        _fp8_tensor("_scale", (1,)), {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "INT8 per row, compressed-tensors": (_int8_rows, _compressed("int", "channel")),
    "FP8 per row, compressed-tensors": (_fp8_rows, _compressed("float", "channel")),
    "FP8 per tensor, compressed-tensors": (
        _fp8_tensor("_scale", (1,)), _compressed("float", "tensor"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_eight_bits(tmp_path, family, name):
    scheme, quantization = FORMATS[name]
    _write(tmp_path, family)
    exact = _theirs(tmp_path)
    stored = _quantized(tmp_path, scheme)
    want = _theirs(tmp_path)
    _write_eight_bits(tmp_path, stored)
    _edit(tmp_path, quantization_config=quantization)
    ours = _ours(tmp_path)
    _agree(ours, want)
    assert np.abs(ours - exact).max() > 1e-3  # rounding shows
    _edit(tmp_path, quantization_config=...)
    with pytest.raises(ValueError, match=r"is FP8, but config.json|has type int8; weights are"):
        load(tmp_path)


def _write_eight_bits(folder, stored):
    specs = {name: TensorSpec(t.dtype, t.shape) for name, t in stored.items()}
    write_tensors(folder / "model.safetensors", specs, stored.items())


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_scales_beside_weights_that_are_not_scaled_do_nothing(tmp_path, suffix):
    _write(tmp_path, "deepseek_v3")
    want = _theirs(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    left = {
        name + suffix: np.full((1, 1), 3.0, np.float32)
        for name, w in tensors.items() if w.ndim == 2 and "proj" in name
    }  # fmt: skip
    assert len(left) > 10
    save_file(tensors | left, tmp_path / "model.safetensors")
    _agree(_ours(tmp_path), want)
    _edit(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    _agree(_ours(tmp_path), want)
