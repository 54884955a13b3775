"""Sizes and constants of one mixture-of-experts transformer, or of a dense one."""

import dataclasses
from typing import Any, Literal

from cmjax.models.moe.positions import Rope, YarnConfig

Family = Literal["deepseek_v2", "deepseek_v3", "glm4_moe", "qwen3_moe", "mixtral", "qwen3", "llama"]
DENSE: tuple[Family, ...] = ("qwen3", "llama")
"""Families without experts."""
LayerKind = Literal["dense", "moe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    q_lora_rank: int | None
    """Width of the query latent; `None` where queries are projected from the input directly."""
    kv_lora_rank: int
    """Width of the key/value latent: what the cache holds per token, besides the rotary key."""
    qk_nope_dim: int
    """Per-head query and key width without position."""
    qk_rope_dim: int
    """Per-head query and key width that is rotated."""
    v_dim: int
    """Per-head value width."""
    bias: bool = False
    """Whether the down- and the output projections have one."""

    @property
    def qk_dim(self) -> int:
        """Per-head width of queries and keys."""
        return self.qk_nope_dim + self.qk_rope_dim

    @property
    def rope_dim(self) -> int:
        """Per-head width that positions may rotate; see `MoEConfig.rope_dim`."""
        return self.qk_rope_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedAttention:
    """Grouped-query attention (Ainslie et al. 2023)."""

    kv_heads: int
    """Key and value heads; each serves `heads / kv_heads` query heads."""
    head_dim: int
    """Per-head width of queries, keys and values."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head before rotation (Qwen3)."""
    bias: bool = False
    """Whether the projections to queries, keys and values have one."""
    out_bias: bool = False
    """Whether the output projection has one."""
    window: int | None = None
    """A query sees this many newest keys, its own included; `None` for all."""

    @property
    def qk_dim(self) -> int:
        """Per-head width of queries and keys."""
        return self.head_dim

    @property
    def rope_dim(self) -> int:
        """Per-head width that positions may rotate; see `MoEConfig.rope_dim`."""
        return self.head_dim

    def kv_heads_of(self, tensor: int) -> int:
        """Key and value heads that each of `tensor` ranks holds; ranks that attend with the same
        one each have a copy."""
        return max(1, self.kv_heads // tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and constants of one model. Validated on construction."""

    vocab_size: int
    """Tokens in the vocabulary."""
    hidden_size: int
    """Width of the residual stream."""
    layers: int
    """Transformer layers, dense ones included, the MTP layer not."""
    dense_layers: tuple[int, ...]
    """Numbers of the layers with a dense feed-forward block instead of experts, ascending. With all
    of them the model is dense, and what is said of experts below plays no part."""
    heads: int
    """Attention (query) heads."""
    attention: LatentAttention | GroupedAttention
    """Form and sizes of the attention of every layer."""
    ffn_size: int
    """Inner width of dense feed-forward blocks."""
    expert_ffn_size: int
    """Inner width of one expert."""
    routed_experts: int
    """Routed experts per layer."""
    shared_experts: int
    """Shared experts per layer, fused into one of `shared_experts * expert_ffn_size`."""
    experts_per_token: int
    """Routed experts each token visits (top-k)."""
    expert_groups: int
    """Groups of the group-limited routing."""
    groups_per_token: int
    """Groups each token may choose from."""
    routed_scale: float = 1.0
    """Factor on the routing weights."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """How router logits become scores."""
    score_bias: bool = True
    """Whether a learned bias enters the choice of experts (not their weights)."""
    group_best: int = 2
    """A group's strength is the sum of this many of its best scores."""
    normalize_weights: bool = True
    """Whether the chosen experts' scores are divided by their sum."""
    ffn_bias: bool = False
    """Whether dense and shared feed-forward blocks have biases; routed experts never do."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm but those of the latents, which have 1e-6."""
    rope: Rope = dataclasses.field(default_factory=Rope)
    """Rotary positions."""
    tie_embeddings: bool = False
    """Whether the output head is the embedding, transposed."""
    max_position: int = 4096
    """Longest context the model is meant for, tokens; see `context_limit`."""
    mtp_layers: int = 0
    """Multi-token-prediction modules."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a text."""
    family: Family = "deepseek_v3"
    """`model_type` of a config.json, which also fixes how its tensors are named."""

    def __post_init__(self):
        if self.routed_experts % self.expert_groups:
            raise ValueError(
                f"MoEConfig: routed_experts must be a multiple of expert_groups, "
                f"got {self.routed_experts} and {self.expert_groups}"
            )
        if not 1 <= self.groups_per_token <= self.expert_groups:
            raise ValueError(
                f"MoEConfig: groups_per_token must lie in 1..{self.expert_groups} (expert_groups), "
                f"got {self.groups_per_token}"
            )
        choice = self.routed_experts // self.expert_groups * self.groups_per_token
        if not 1 <= self.experts_per_token <= choice:
            raise ValueError(
                f"MoEConfig: experts_per_token must lie in 1..{choice} (experts in the chosen "
                f"groups), got {self.experts_per_token}"
            )
        outside = [layer for layer in self.dense_layers if not 0 <= layer < self.layers]
        if outside or list(self.dense_layers) != sorted(set(self.dense_layers)):
            raise ValueError(
                f"MoEConfig: dense_layers must be ascending layer numbers in 0..{self.layers - 1}, "
                f"got {self.dense_layers}"
            )
        whole = self.attention.rope_dim
        if self.rope_dim % 2 or not 0 < self.rope_dim <= whole:
            raise ValueError(
                f"MoEConfig: the rotated width must be even, got {self.rope_dim} "
                f"(rope.fraction {self.rope.fraction:g} of {whole}); 2 to {whole} would do"
            )
        if isinstance(self.attention, GroupedAttention):
            if self.heads % self.attention.kv_heads:
                raise ValueError(
                    f"MoEConfig: heads must be a multiple of attention.kv_heads, got {self.heads} "
                    f"and {self.attention.kv_heads}"
                )
            if self.attention.window is not None and self.attention.window < 1:
                raise ValueError(
                    f"MoEConfig: attention.window must be at least 1, got {self.attention.window}"
                )

    @property
    def rope_dim(self) -> int:
        """Per-head width that is rotated; rounded down, as Hugging Face transformers does."""
        return int(self.attention.rope_dim * self.rope.fraction)

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.layers - len(self.dense_layers)

    @property
    def context_limit(self) -> int:
        """Longest context, tokens: `max_position`, or as far as YaRN stretches the original one."""
        yarn = self.rope.scaling
        if not isinstance(yarn, YarnConfig):
            return self.max_position
        return max(self.max_position, int(yarn.factor * yarn.original_max_position))

    @property
    def dense(self) -> bool:
        """Whether no layer has experts."""
        return not self.moe_layers

    def kind(self, layer: int) -> LayerKind:
        """What the feed-forward block of a layer is."""
        return "dense" if layer in self.dense_layers else "moe"

    @property
    def runs(self) -> tuple[tuple[LayerKind, range], ...]:
        """Consecutive layers of one kind: the kind, and their numbers among layers of that kind."""
        runs: list[tuple[LayerKind, range]] = []
        done: dict[LayerKind, int] = {"dense": 0, "moe": 0}
        for layer in range(self.layers):
            kind, number = self.kind(layer), done[self.kind(layer)]
            first = runs.pop()[1].start if runs and runs[-1][0] == kind else number
            runs.append((kind, range(first, number + 1)))
            done[kind] += 1
        return tuple(runs)


def dense_config(*, layers: int, ffn_size: int, **fields: Any) -> MoEConfig:
    """A model whose layers all have a dense feed-forward block.

    Args:
      layers, ffn_size, **fields: of `MoEConfig`, without what it says of experts.
    """
    return MoEConfig(
        layers=layers,
        dense_layers=tuple(range(layers)),
        ffn_size=ffn_size,
        expert_ffn_size=ffn_size,
        routed_experts=1,
        shared_experts=0,
        experts_per_token=1,
        expert_groups=1,
        groups_per_token=1,
        scoring="softmax",
        score_bias=False,
        group_best=1,
        **fields,
    )
