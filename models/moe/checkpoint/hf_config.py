"""A model's sizes from a Hugging Face config.json, and back.

Families: DeepSeek-V2, DeepSeek-V3 (R1; Kimi-K2 is one in all but name), Qwen3-MoE and Mixtral.
Rotary positions are read in both published forms: `rope_parameters` (transformers 5) and the older
top-level `rope_theta` with `rope_scaling`; they are written in the newer. What a family allows but
this model does not compute is refused, never ignored.
"""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmjax.models.moe.config import (
    PRESETS,
    DynamicScaling,
    GroupedAttention,
    LatentAttention,
    LinearScaling,
    Llama3Scaling,
    MoEConfig,
    Rope,
    RopeScaling,
    YarnConfig,
)

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def load_config(name_or_path: str | Path) -> MoEConfig:
    """A preset by name, or a config.json by path.

        >>> load_config("deepseek-r1").routed_experts
        256

    Raises:
      ValueError: neither; says which presets exist and which is close.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return PRESETS[name]()
    if Path(name).exists():
        return read_config(name)
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"load_config: {name!r} is neither a file nor a preset ({', '.join(sorted(PRESETS))}){hint}"
    )


def read_config(path: str | Path) -> MoEConfig:
    """Read a config.json (or the one in a folder).

    Raises:
      ValueError: an unknown family, a key missing, of the wrong type, or asking for something this
        model does not compute; names file, key and value.
    """
    return parse_config(*read_json(path))


def read_json(path: str | Path) -> tuple[dict[str, Any], Path]:
    """The keys of a config.json (or of the one in a folder), and which file that was."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(raw).__name__}")
    return raw, path


def parse_config(raw: dict[str, Any], path: Path) -> MoEConfig:
    """As `read_config`, of keys already read from `path`."""
    family = raw.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"{path}: model_type must be one of {', '.join(_FAMILIES)}, got {family!r}"
        )
    keys = _Keys(raw, path)
    keys.only("hidden_act", "silu")
    keys.only("partial_rotary_factor", 1, 1.0)
    return MoEConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        layers=keys.integer("num_hidden_layers"),
        heads=keys.integer("num_attention_heads"),
        experts_per_token=keys.integer("num_experts_per_tok"),
        max_position=keys.integer("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        end_tokens=keys.tokens("eos_token_id"),
        **_FAMILIES[family](keys),
    )


def config_json(config: MoEConfig) -> dict[str, Any]:
    """The keys of a config.json that reads as `config`.

    Raises:
      ValueError: the family's config.json cannot say it; names the field.
    """
    attention = config.attention
    latent = isinstance(attention, LatentAttention)
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads if latent else attention.kv_heads,
        "num_experts_per_tok": config.experts_per_token,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": _scalar(config.end_tokens),
        "rope_parameters": _rope_json(config.rope),
        "intermediate_size": config.ffn_size,
    }
    if isinstance(attention, LatentAttention):
        raw |= {
            "q_lora_rank": attention.q_lora_rank,
            "kv_lora_rank": attention.kv_lora_rank,
            "qk_nope_head_dim": attention.qk_nope_dim,
            "qk_rope_head_dim": attention.qk_rope_dim,
            "v_head_dim": attention.v_dim,
            "attention_bias": attention.bias,
            "moe_intermediate_size": config.expert_ffn_size,
            "first_k_dense_replace": len(config.dense_layers),
            "n_routed_experts": config.routed_experts,
            "n_shared_experts": config.shared_experts,
            "n_group": config.expert_groups,
            "topk_group": config.groups_per_token,
            "norm_topk_prob": config.normalize_weights,
            "routed_scaling_factor": config.routed_scale,
        }
        if config.family == "deepseek_v2":
            method = "greedy" if config.expert_groups == 1 else "group_limited_greedy"
            raw |= {"topk_method": method, "mlp_bias": config.ffn_bias}
        else:
            raw |= {
                "rope_interleave": config.rope.interleave,
                "num_nextn_predict_layers": config.mtp_layers,
            }
    else:
        raw |= {"head_dim": attention.head_dim, "sliding_window": attention.window}
        raw["num_local_experts"] = config.routed_experts
        if config.family == "qwen3_moe":
            raw |= {
                "num_experts": config.routed_experts,
                "moe_intermediate_size": config.expert_ffn_size,
                "norm_topk_prob": config.normalize_weights,
                "attention_bias": attention.bias,
                "use_sliding_window": attention.window is not None,
                "decoder_sparse_step": 1,
                "mlp_only_layers": list(config.dense_layers),
            }
    _check_written(raw, config)
    return raw


class _Keys:
    """Typed access to the keys of one file."""

    def __init__(self, raw: dict[str, Any], path: Path):
        self.raw, self.path = raw, path

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            state = "is missing" if key not in self.raw else f"must be a number, got {value!r}"
            raise ValueError(f"{self.path}: key {key!r} {state}")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise ValueError(f"{self.path}: key {key!r} must be a whole number, got {value!r}")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: key {key!r} must be true or false, got {value!r}")
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in listed):
            raise ValueError(f"{self.path}: key {key!r} must hold token numbers, got {value!r}")
        return tuple(listed)

    def only(self, key: str, *allowed: Any) -> None:
        """The key is absent, null, or one of `allowed`: this model computes nothing else."""
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.path}: key {key!r} must be {wanted} here, got {value!r}")


def _deepseek(keys: _Keys) -> dict[str, Any]:
    """What DeepSeek-V2 and V3 say alike."""
    keys.only("moe_layer_freq", 1)
    first = min(keys.integer("first_k_dense_replace", 0), keys.integer("num_hidden_layers"))
    rank = None if keys.raw.get("q_lora_rank", 0) is None else keys.integer("q_lora_rank")
    return {
        "dense_layers": tuple(range(first)),
        "attention": LatentAttention(
            q_lora_rank=rank,
            kv_lora_rank=keys.integer("kv_lora_rank"),
            qk_nope_dim=keys.integer("qk_nope_head_dim"),
            qk_rope_dim=keys.integer("qk_rope_head_dim"),
            v_dim=keys.integer("v_head_dim"),
            bias=keys.flag("attention_bias", False),
        ),
        "ffn_size": keys.integer("intermediate_size"),
        "expert_ffn_size": keys.integer("moe_intermediate_size"),
        "routed_experts": keys.integer("n_routed_experts"),
        "shared_experts": keys.integer("n_shared_experts", 0),
        "routed_scale": keys.number("routed_scaling_factor"),
    }


def _deepseek_v2(keys: _Keys) -> dict[str, Any]:
    keys.only("scoring_func", "softmax")
    keys.only("topk_method", "greedy", "group_limited_greedy")
    grouped = keys.raw.get("topk_method") == "group_limited_greedy"
    return _deepseek(keys) | {
        "family": "deepseek_v2",
        "scoring": "softmax",
        "score_bias": False,
        "expert_groups": keys.integer("n_group") if grouped else 1,
        "groups_per_token": keys.integer("topk_group") if grouped else 1,
        "group_best": 1,
        # Transformers never normalises in this family, whatever norm_topk_prob says.
        "normalize_weights": False,
        "ffn_bias": keys.flag("mlp_bias", False),
        "rope": _rope(keys, interleave=True),
    }


def _deepseek_v3(keys: _Keys) -> dict[str, Any]:
    keys.only("scoring_func", "sigmoid")
    keys.only("topk_method", "noaux_tc")
    return _deepseek(keys) | {
        "family": "deepseek_v3",
        "expert_groups": keys.integer("n_group", 1),
        "groups_per_token": keys.integer("topk_group", 1),
        "normalize_weights": keys.flag("norm_topk_prob", True),
        "mtp_layers": keys.integer("num_nextn_predict_layers", 0),
        "rope": _rope(keys, interleave=keys.flag("rope_interleave", True)),
    }


def _grouped(keys: _Keys, **options: Any) -> dict[str, Any]:
    """What Qwen3-MoE and Mixtral say alike: grouped queries, softmax routing, nothing shared."""
    heads = keys.integer("num_attention_heads")
    default_dim = keys.integer("hidden_size") // heads
    experts = "num_experts" if "num_experts" in keys.raw else "num_local_experts"
    return {
        "attention": GroupedAttention(
            kv_heads=keys.integer("num_key_value_heads", heads),
            head_dim=keys.integer("head_dim", default_dim),
            **options,
        ),
        "ffn_size": keys.integer("intermediate_size"),
        "routed_experts": keys.integer(experts),
        "shared_experts": 0,
        "expert_groups": 1,
        "groups_per_token": 1,
        "group_best": 1,
        "scoring": "softmax",
        "score_bias": False,
        "rope": _rope(keys, interleave=False),
    }


def _qwen3_moe(keys: _Keys) -> dict[str, Any]:
    layers, step = keys.integer("num_hidden_layers"), keys.integer("decoder_sparse_step", 1)
    if step < 1:
        raise ValueError(f"{keys.path}: key 'decoder_sparse_step' must be at least 1, got {step}")
    only = set(keys.tokens("mlp_only_layers"))
    dense = tuple(i for i in range(layers) if i in only or (i + 1) % step)
    window = keys.integer("sliding_window") if keys.flag("use_sliding_window", False) else None
    bias = keys.flag("attention_bias", False)
    return _grouped(keys, qk_norm=True, bias=bias, window=window) | {
        "family": "qwen3_moe",
        "dense_layers": dense,
        "expert_ffn_size": keys.integer("moe_intermediate_size"),
        "normalize_weights": keys.flag("norm_topk_prob", False),
    }


def _mixtral(keys: _Keys) -> dict[str, Any]:
    keys.only("attention_bias", False)
    window = keys.raw.get("sliding_window")
    window = None if window is None else keys.integer("sliding_window")
    return _grouped(keys, window=window) | {
        "family": "mixtral",
        "dense_layers": (),
        "expert_ffn_size": keys.integer("intermediate_size"),
    }


_FAMILIES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
}


def _rope(keys: _Keys, *, interleave: bool) -> Rope:
    given = keys.raw.get("rope_parameters") or keys.raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{keys.path}: key 'rope_parameters' must be an object, got {given!r}")
    theta = given.get("rope_theta", keys.raw.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{keys.path}: key 'rope_theta' is missing, also within 'rope_parameters'")
    rope = _Keys(given | {"rope_theta": theta}, keys.path)
    rope.only("partial_rotary_factor", 1, 1.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default" and kind not in _SCALINGS:
        raise ValueError(
            f"{keys.path}: key 'rope_type' must be 'default', "
            f"{', '.join(map(repr, _SCALINGS))} here, got {kind!r}"
        )
    scaling = None if kind == "default" else _SCALINGS[kind](rope, keys.integer(_MAX_POSITION))
    return Rope(theta=rope.number("rope_theta"), interleave=interleave, scaling=scaling)


_MAX_POSITION = "max_position_embeddings"
_ORIGINAL = "original_max_position_embeddings"


def _yarn(rope: _Keys, max_position: int) -> YarnConfig:
    original = rope.integer(_ORIGINAL, max_position)

    def optional(key: str) -> float | None:
        return None if rope.raw.get(key) is None else rope.number(key)

    return YarnConfig(
        # published as null by some: the ratio of the two lengths is meant
        factor=rope.number(
            "factor", max_position / original if rope.raw.get("factor", 0) is None else None
        ),
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        attention_factor=optional("attention_factor"),
        truncate=rope.flag("truncate", True),
    )


def _llama3(rope: _Keys, max_position: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer(_ORIGINAL, max_position),
    )


_SCALINGS: dict[str, Callable[[_Keys, int], RopeScaling]] = {
    "linear": lambda rope, _: LinearScaling(factor=rope.number("factor")),
    "dynamic": lambda rope, _: DynamicScaling(factor=rope.number("factor")),
    "llama3": _llama3,
    "yarn": _yarn,
}


def _rope_json(rope: Rope) -> dict[str, Any]:
    match rope.scaling:
        case None:
            fields: dict[str, Any] = {"rope_type": "default"}
        case LinearScaling(factor=factor):
            fields = {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor=factor):
            fields = {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling() as scaling:
            fields = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                _ORIGINAL: scaling.original_max_position,
            }
        case YarnConfig() as scaling:
            fields = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                _ORIGINAL: scaling.original_max_position,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "mscale": scaling.mscale,
                "mscale_all_dim": scaling.mscale_all_dim,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
    fields = {key: value for key, value in fields.items() if value is not None}
    return {"rope_theta": rope.theta} | fields


def _scalar(tokens: tuple[int, ...]) -> int | list[int] | None:
    return tokens[0] if len(tokens) == 1 else list(tokens) or None


def _check_written(raw: dict[str, Any], config: MoEConfig) -> None:
    """Every field must survive being written, or the saved model would be another one."""
    try:
        again = parse_config(raw, Path("config.json"))
    except ValueError as error:
        raise ValueError(f"config_json: a {config.family} config.json: {error}") from None
    for field in MoEConfig.__dataclass_fields__:
        was, now = getattr(config, field), getattr(again, field)
        if was != now:
            raise ValueError(
                f"config_json: a {config.family} config.json cannot say {field} = {was}; it would "
                f"read {now}. Choose another family"
            )
