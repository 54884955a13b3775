"""Sizes of a DeepSeek-V3 family model, read from a Hugging Face config.json or a preset.

Source of the presets: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 4.2, and the
published config.json of DeepSeek-V3 and DeepSeek-R1.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (Peng et al. 2023), in DeepSeek's parametrisation."""

    factor: float
    """Context length divided by `original_max_position`."""
    original_max_position: int
    """Context length of pre-training."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original context are kept."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are interpolated by `factor`."""
    mscale: float | None = None
    """Numerator of the factor on cos and sin."""
    mscale_all_dim: float | None = None
    """Denominator of that factor; also scales the softmax temperature."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and constants of one model. Validated on construction."""

    vocab_size: int
    """Tokens in the vocabulary."""
    hidden_size: int
    """Width of the residual stream."""
    layers: int
    """Transformer layers, dense ones included, the MTP layer not."""
    dense_layers: int
    """First layers with a dense feed-forward block instead of experts."""
    heads: int
    """Attention heads."""
    q_lora_rank: int
    """Width of the query latent."""
    kv_lora_rank: int
    """Width of the key/value latent: what the cache holds per token, besides the rotary key."""
    qk_nope_dim: int
    """Per-head query and key width without position."""
    qk_rope_dim: int
    """Per-head query and key width that is rotated."""
    v_dim: int
    """Per-head value width."""
    ffn_size: int
    """Inner width of dense feed-forward blocks."""
    expert_ffn_size: int
    """Inner width of one expert."""
    experts: int
    """Routed experts per layer."""
    shared_experts: int
    """Shared experts per layer, fused into one of `shared_experts * expert_ffn_size`."""
    experts_per_token: int
    """Routed experts each token visits (top-k)."""
    expert_groups: int
    """Groups of the group-limited routing."""
    groups_per_token: int
    """Groups each token may choose from."""
    routed_scale: float
    """Factor on the normalised routing weights."""
    normalize_weights: bool = True
    """Whether the chosen experts' scores are divided by their sum."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_interleave: bool = True
    """Rotary pairs are neighbouring dimensions (2i, 2i+1), not (i, i + d/2)."""
    yarn: YarnConfig | None = None
    """Context extension, if any."""
    max_position: int = 4096
    """Longest context the model is meant for, tokens."""
    mtp_layers: int = 0
    """Multi-token-prediction modules."""

    def __post_init__(self):
        if self.experts % self.expert_groups:
            raise ValueError(
                f"MoEConfig: experts must be a multiple of expert_groups, "
                f"got {self.experts} and {self.expert_groups}"
            )
        if not 1 <= self.groups_per_token <= self.expert_groups:
            raise ValueError(
                f"MoEConfig: groups_per_token must lie in 1..{self.expert_groups} (expert_groups), "
                f"got {self.groups_per_token}"
            )
        choice = self.experts // self.expert_groups * self.groups_per_token
        if not 1 <= self.experts_per_token <= choice:
            raise ValueError(
                f"MoEConfig: experts_per_token must lie in 1..{choice} (experts in the chosen "
                f"groups), got {self.experts_per_token}"
            )
        if not 0 <= self.dense_layers < self.layers:
            raise ValueError(
                f"MoEConfig: dense_layers must lie in 0..{self.layers - 1}, got {self.dense_layers}"
            )
        if self.qk_rope_dim % 2:
            raise ValueError(f"MoEConfig: qk_rope_dim must be even, got {self.qk_rope_dim}")

    @property
    def qk_dim(self) -> int:
        """Per-head width of queries and keys."""
        return self.qk_nope_dim + self.qk_rope_dim

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers

    @classmethod
    def from_json(cls, path: str | Path) -> "MoEConfig":
        """Read a Hugging Face config.json (or the folder that holds one).

        Both rope layouts are read: `rope_parameters` (transformers 5) and the older top-level
        `rope_theta` with `rope_scaling`.

        Raises:
          ValueError: the file is no DeepSeek-V3 config, or misses a key; names file and key.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            raw = json.loads(path.read_text())
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        return cls(**_fields_of(raw, path))


_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_dim": "qk_nope_head_dim",
    "qk_rope_dim": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
    "ffn_size": "intermediate_size",
    "expert_ffn_size": "moe_intermediate_size",
    "experts": "n_routed_experts",
    "shared_experts": "n_shared_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_groups": "n_group",
    "groups_per_token": "topk_group",
    "max_position": "max_position_embeddings",
}


def _fields_of(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    if raw.get("model_type") not in ("deepseek_v3",):
        raise ValueError(f"{path}: model_type must be 'deepseek_v3', got {raw.get('model_type')!r}")
    fields: dict[str, Any] = {field: _integer(raw, key, path) for field, key in _KEYS.items()}
    fields["routed_scale"] = _number(raw, "routed_scaling_factor", path)
    fields["normalize_weights"] = bool(raw.get("norm_topk_prob", True))
    fields["norm_eps"] = float(raw.get("rms_norm_eps", 1e-6))
    fields["rope_interleave"] = bool(raw.get("rope_interleave", True))
    fields["mtp_layers"] = int(raw.get("num_nextn_predict_layers") or 0)

    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{path}: key 'rope_theta' is missing, also within 'rope_parameters'")
    fields["rope_theta"] = float(theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "yarn":
        fields["yarn"] = YarnConfig(
            factor=_number(rope, "factor", path),
            original_max_position=_integer(rope, "original_max_position_embeddings", path),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            mscale=rope.get("mscale"),
            mscale_all_dim=rope.get("mscale_all_dim"),
        )
    elif kind != "default":
        raise ValueError(f"{path}: key 'rope_type' must be 'default' or 'yarn', got {kind!r}")
    return fields


def _number(raw: dict[str, Any], key: str, path: Path) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        state = "is missing" if key not in raw else f"must be a number, got {value!r}"
        raise ValueError(f"{path}: key {key!r} {state}")
    return value


def _integer(raw: dict[str, Any], key: str, path: Path) -> int:
    value = _number(raw, key, path)
    if value != int(value):
        raise ValueError(f"{path}: key {key!r} must be a whole number, got {value!r}")
    return int(value)


def deepseek_v3() -> MoEConfig:
    """DeepSeek-V3: 671B parameters, 37B active per token, one MTP module."""
    return MoEConfig(
        vocab_size=129280,
        hidden_size=7168,
        layers=61,
        dense_layers=3,
        heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_dim=128,
        qk_rope_dim=64,
        v_dim=128,
        ffn_size=18432,
        expert_ffn_size=2048,
        experts=256,
        shared_experts=1,
        experts_per_token=8,
        expert_groups=8,
        groups_per_token=4,
        routed_scale=2.5,
        yarn=YarnConfig(factor=40.0, original_max_position=4096, mscale=1.0, mscale_all_dim=1.0),
        max_position=163840,
        mtp_layers=1,
    )


def deepseek_r1() -> MoEConfig:
    """DeepSeek-R1: the sizes of DeepSeek-V3, other weights."""
    return deepseek_v3()


def tiny() -> MoEConfig:
    """A model of every feature that runs anywhere: 3 layers, 16 experts, 64 wide."""
    return MoEConfig(
        vocab_size=320,
        hidden_size=64,
        layers=3,
        dense_layers=1,
        heads=8,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_dim=16,
        qk_rope_dim=8,
        v_dim=16,
        ffn_size=96,
        expert_ffn_size=32,
        experts=16,
        shared_experts=1,
        experts_per_token=4,
        expert_groups=4,
        groups_per_token=2,
        routed_scale=2.5,
        max_position=256,
        mtp_layers=1,
    )


PRESETS: dict[str, Callable[[], MoEConfig]] = {
    "deepseek-r1": deepseek_r1,
    "deepseek-v3": deepseek_v3,
    "tiny": tiny,
}


def load_config(name_or_path: str | Path) -> MoEConfig:
    """A preset by name, or a config.json by path.

    Raises:
      ValueError: neither; says which presets exist and which is close.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return PRESETS[name]()
    if Path(name).exists():
        return MoEConfig.from_json(name)
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"load_config: {name!r} is neither a file nor a preset ({', '.join(sorted(PRESETS))}){hint}"
    )
