"""A model's sizes from a Hugging Face config.json, and back.

Families: DeepSeek-V2, DeepSeek-V3 (R1; Kimi-K2 is one in all but name), GLM-4.5 (4.6, 4.7),
Qwen3-MoE and Mixtral; of dense models Qwen3 and Llama.
What a key may hold, and what holds where it is absent, is in `config_schema`. What a family allows
but this model does not compute is refused, never ignored.
"""

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cmjax.models.moe.checkpoint.config_schema import (
    CommonKeys,
    DeepseekV2Keys,
    DeepseekV3Keys,
    Glm4MoeKeys,
    KimiK2Keys,
    LlamaKeys,
    MixtralKeys,
    Qwen3Keys,
    Qwen3MoeKeys,
    token_numbers,
)
from cmjax.models.moe.checkpoint.json_file import convert, read_object
from cmjax.models.moe.checkpoint.rope_keys import read_rope, rope_json
from cmjax.models.moe.config import DENSE, GroupedAttention, LatentAttention, MoEConfig
from cmjax.models.moe.presets import PRESETS

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
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
    return read_object(path), path


def parse_config(raw: dict[str, Any], path: Path) -> MoEConfig:
    """As `read_config`, of keys already read from `path`."""
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {name!r}")
    family = FAMILIES[name]
    renamed = _renamed(raw, family.schema.aliases, path)
    if missing := [key for key in family.schema.required if key not in renamed]:
        raise ValueError(f"{path}: key {missing[0]!r} is missing")
    keys = convert(renamed, family.schema, path)
    rope = read_rope(raw, keys, path)
    try:
        fields = family.fields(keys)
        rope = dataclasses.replace(rope, interleave=fields.pop("interleave", False))
        return MoEConfig(
            vocab_size=keys.vocab_size,
            hidden_size=keys.hidden_size,
            layers=keys.num_hidden_layers,
            heads=keys.num_attention_heads,
            ffn_size=keys.intermediate_size,
            max_position=keys.max_position_embeddings,
            norm_eps=keys.rms_norm_eps,
            tie_embeddings=keys.tie_word_embeddings,
            end_tokens=token_numbers(keys.eos_token_id),
            rope=rope,
            **fields,
        )
    except ValueError as error:  # sizes that contradict each other
        raise ValueError(f"{path}: {error}") from None


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
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": _scalar(config.end_tokens),
        "rope_parameters": rope_json(config.rope),
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
        } | _experts_json(config)
        if config.family == "deepseek_v2":
            method = "greedy" if config.expert_groups == 1 else "group_limited_greedy"
            raw |= {"topk_method": method, "mlp_bias": config.ffn_bias}
        else:
            raw |= {
                "rope_interleave": config.rope.interleave,
                "num_nextn_predict_layers": config.mtp_layers,
            }
    elif config.family == "glm4_moe":
        raw |= {
            "head_dim": attention.head_dim,
            "attention_bias": attention.bias,
            "use_qk_norm": attention.qk_norm,
            "partial_rotary_factor": config.rope.fraction,
            "num_nextn_predict_layers": config.mtp_layers,
        } | _experts_json(config)
    elif config.family in DENSE:
        raw |= {"head_dim": attention.head_dim, "attention_bias": attention.bias}
        if config.family == "llama":
            raw["mlp_bias"] = config.ffn_bias
    else:
        raw |= {"head_dim": attention.head_dim, "sliding_window": attention.window}
        raw |= {
            "num_local_experts": config.routed_experts,
            "num_experts_per_tok": config.experts_per_token,
        }
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


def _experts_json(config: MoEConfig) -> dict[str, Any]:
    """What `_biased_experts` reads."""
    return {
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_ffn_size,
        "first_k_dense_replace": len(config.dense_layers),
        "n_routed_experts": config.routed_experts,
        "n_shared_experts": config.shared_experts,
        "n_group": config.expert_groups,
        "topk_group": config.groups_per_token,
        "norm_topk_prob": config.normalize_weights,
        "routed_scaling_factor": config.routed_scale,
    }


def _renamed(raw: dict[str, Any], aliases: dict[str, str], path: Path) -> dict[str, Any]:
    """`raw` with every alias under the key it stands for."""
    found = dict(raw)
    for alias, key in aliases.items():
        if alias not in raw:
            continue
        if found.setdefault(key, raw[alias]) != raw[alias]:
            raise ValueError(
                f"{path}: keys {key!r} and {alias!r} mean the same and disagree: {raw[key]!r} and "
                f"{raw[alias]!r}"
            )
    return found


def _experts(keys: DeepseekV2Keys | DeepseekV3Keys | Glm4MoeKeys) -> dict[str, Any]:
    """What DeepSeek and GLM say alike: dense layers come first, and some experts are shared."""
    return {
        "dense_layers": tuple(range(min(keys.first_k_dense_replace, keys.num_hidden_layers))),
        "expert_ffn_size": keys.moe_intermediate_size,
        "routed_experts": keys.n_routed_experts,
        "experts_per_token": keys.num_experts_per_tok,
        "shared_experts": keys.n_shared_experts or 0,
        "routed_scale": keys.routed_scaling_factor,
    }


def _biased_experts(keys: DeepseekV3Keys | Glm4MoeKeys) -> dict[str, Any]:
    """What DeepSeek-V3 and GLM say alike: sigmoid scores with a bias, and a draft module."""
    return _experts(keys) | {
        "expert_groups": keys.n_group,
        "groups_per_token": keys.topk_group,
        "normalize_weights": keys.norm_topk_prob,
        "mtp_layers": keys.num_nextn_predict_layers or 0,
    }


def _latent_attention(keys: DeepseekV2Keys | DeepseekV3Keys) -> LatentAttention:
    return LatentAttention(
        q_lora_rank=keys.q_lora_rank,
        kv_lora_rank=keys.kv_lora_rank,
        qk_nope_dim=keys.qk_nope_head_dim,
        qk_rope_dim=keys.qk_rope_head_dim,
        v_dim=keys.v_head_dim,
        bias=keys.attention_bias,
    )


def _deepseek_v2(keys: DeepseekV2Keys) -> dict[str, Any]:
    grouped = keys.topk_method == "group_limited_greedy"
    if grouped and (keys.n_group is None or keys.topk_group is None):
        raise ValueError("topk_method 'group_limited_greedy' needs keys 'n_group' and 'topk_group'")
    return _experts(keys) | {
        "family": "deepseek_v2",
        "attention": _latent_attention(keys),
        "scoring": "softmax",
        "score_bias": False,
        "expert_groups": keys.n_group if grouped else 1,
        "groups_per_token": keys.topk_group if grouped else 1,
        "group_best": 1,
        # Transformers never normalises in this family, whatever norm_topk_prob says.
        "normalize_weights": False,
        "ffn_bias": keys.mlp_bias,
        "interleave": True,
    }


def _deepseek_v3(keys: DeepseekV3Keys) -> dict[str, Any]:
    return _biased_experts(keys) | {
        "family": "deepseek_v3",
        "attention": _latent_attention(keys),
        "interleave": keys.rope_interleave,
    }


def _glm4_moe(keys: Glm4MoeKeys) -> dict[str, Any]:
    bias = keys.attention_bias  # the output projection never has one
    return _biased_experts(keys) | {
        "family": "glm4_moe",
        "attention": _grouped_attention(keys, qk_norm=keys.use_qk_norm, bias=bias),
    }


def _grouped_attention(
    keys: Glm4MoeKeys | Qwen3MoeKeys | MixtralKeys | Qwen3Keys | LlamaKeys, **options: Any
) -> GroupedAttention:
    heads = keys.num_attention_heads
    return GroupedAttention(
        kv_heads=keys.num_key_value_heads or heads,
        head_dim=keys.head_dim or max(1, keys.hidden_size // heads),
        **options,
    )


def _grouped(
    keys: Qwen3MoeKeys | MixtralKeys | Qwen3Keys | LlamaKeys, **options: Any
) -> dict[str, Any]:
    """What Qwen3, Mixtral and Llama say alike: grouped queries, softmax routing, nothing shared."""
    bias = bool(keys.attention_bias)
    return {
        "attention": _grouped_attention(keys, bias=bias, out_bias=bias, **options),
        "shared_experts": 0,
        "expert_groups": 1,
        "groups_per_token": 1,
        "group_best": 1,
        "scoring": "softmax",
        "score_bias": False,
    }


def _qwen3_moe(keys: Qwen3MoeKeys) -> dict[str, Any]:
    only, step = set(keys.mlp_only_layers or ()), keys.decoder_sparse_step
    window = keys.sliding_window if keys.use_sliding_window else None
    return _grouped(keys, qk_norm=True, window=window) | {
        "family": "qwen3_moe",
        "dense_layers": tuple(
            i for i in range(keys.num_hidden_layers) if i in only or (i + 1) % step
        ),
        "expert_ffn_size": keys.moe_intermediate_size,
        "routed_experts": keys.num_experts,
        "experts_per_token": keys.num_experts_per_tok,
        "normalize_weights": keys.norm_topk_prob,
    }


def _mixtral(keys: MixtralKeys) -> dict[str, Any]:
    return _grouped(keys, window=keys.sliding_window) | {
        "family": "mixtral",
        "dense_layers": (),
        "expert_ffn_size": keys.intermediate_size,
        "routed_experts": keys.num_local_experts,
        "experts_per_token": keys.num_experts_per_tok,
    }


def _dense(keys: Qwen3Keys | LlamaKeys, **options: Any) -> dict[str, Any]:
    """What dense families say alike; what is said of experts plays no part."""
    return _grouped(keys, **options) | {
        "dense_layers": tuple(range(keys.num_hidden_layers)),
        "expert_ffn_size": keys.intermediate_size,
        "routed_experts": 1,
        "experts_per_token": 1,
    }


def _qwen3(keys: Qwen3Keys) -> dict[str, Any]:
    return _dense(keys, qk_norm=True) | {"family": "qwen3"}


def _llama(keys: LlamaKeys) -> dict[str, Any]:
    return _dense(keys) | {"family": "llama", "ffn_bias": keys.mlp_bias}


class FamilyReader(NamedTuple):
    """How the config.json of a family is read."""

    schema: type[CommonKeys]
    fields: Callable[[Any], dict[str, Any]]
    """Fields of a `MoEConfig`, from the schema's keys; and `interleave`, of its `Rope`."""


FAMILIES: dict[str, FamilyReader] = {
    "deepseek_v2": FamilyReader(DeepseekV2Keys, _deepseek_v2),
    "deepseek_v3": FamilyReader(DeepseekV3Keys, _deepseek_v3),
    "glm4_moe": FamilyReader(Glm4MoeKeys, _glm4_moe),
    "kimi_k2": FamilyReader(KimiK2Keys, _deepseek_v3),
    "qwen3_moe": FamilyReader(Qwen3MoeKeys, _qwen3_moe),
    "mixtral": FamilyReader(MixtralKeys, _mixtral),
    "qwen3": FamilyReader(Qwen3Keys, _qwen3),
    "llama": FamilyReader(LlamaKeys, _llama),
}
"""By `model_type`."""


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
