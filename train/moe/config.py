"""Everything that a language-model run can be told; the command line is made of it."""

import dataclasses
from pathlib import Path
from typing import Literal

from cmjax.inputs import check_count
from cmjax.models.moe.config import GroupedAttention, LatentAttention, MoEConfig
from train.language_model import LanguageModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(LanguageModelOptions):
    """Train a byte-level mixture-of-experts language model."""

    mesh: str = "1x1"
    """Ranks, as nodes x npus: each holds a share of the experts and of the batch."""
    attention: Literal["latent", "grouped"] = "latent"
    """DeepSeek's multi-head latent attention, or grouped queries."""
    hidden: int = 256
    """Width of the residual stream."""
    layers: int = 3
    """Layers; the first has a dense feed-forward block."""
    heads: int = 4
    """Query heads, 32 wide."""
    experts: int = 8
    """Routed experts per layer; there is a shared one besides."""
    experts_per_token: int = 2
    """How many of them a token visits."""
    expert_ffn: int = 512
    """Inner width of an expert."""
    capacity_factor: float = 1.5
    """Rows reserved per expert over their mean number; copies beyond are dropped. 0 drops none,
    and makes losses equal on every mesh."""
    steps: int = 250
    """Optimiser steps."""
    bias_rate: float = 1e-3
    """Step of the load-balancing bias (DeepSeek-V3 report, section 2.1.2)."""
    out: Path = Path("out/moe_lm")
    """Folder of checkpoints and metrics; an unfinished run in it goes on."""

    def __post_init__(self):
        super().__post_init__()
        check_count("--steps", self.steps)
        if self.capacity_factor and self.capacity_factor < 1:
            raise ValueError(f"--capacity-factor must be 0, or 1 or more: {self.capacity_factor}")

    @property
    def model(self) -> MoEConfig:
        """Sizes of the network."""
        if self.attention == "latent":
            attention = LatentAttention(
                q_lora_rank=64, kv_lora_rank=64, qk_nope_dim=32, qk_rope_dim=16, v_dim=32
            )
        else:
            attention = GroupedAttention(kv_heads=max(1, self.heads // 2), head_dim=32)
        return MoEConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            layers=self.layers,
            dense_layers=(0,),
            heads=self.heads,
            attention=attention,
            ffn_size=3 * self.hidden,
            expert_ffn_size=self.expert_ffn,
            routed_experts=self.experts,
            shared_experts=1,
            experts_per_token=self.experts_per_token,
            expert_groups=1,
            groups_per_token=1,
            routed_scale=1.0,
            max_position=max(256, self.length),
        )
