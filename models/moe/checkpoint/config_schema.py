"""What a config.json of each family may hold: one schema per family, its only table of defaults.

A key that is absent takes the default of that family's class in Hugging Face transformers. Sizes
have none here: a file that does not name its sizes is damaged, whatever the class would assume. A
`null` is refused unless the type allows it. What a family's config can say and this model does not
compute is a `Literal` of the one value it computes.
"""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Layers = Annotated[int, Meta(ge=1, le=10_000)]
Experts = Annotated[int, Meta(ge=1, le=100_000)]
Count = Annotated[int, Meta(ge=0, le=100_000)]
Factor = Annotated[float, Meta(gt=0, le=1e12)]
Epsilon = Annotated[float, Meta(ge=0, lt=1)]
_Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tokens = Annotated[_Token | list[_Token] | None, Meta(description="token numbers")]
_LayerNumbers = Annotated[
    list[Annotated[int, Meta(ge=0, le=2**31 - 1)]] | None, Meta(description="layer numbers")
]


def token_numbers(tokens: int | list[int] | None) -> tuple[int, ...]:
    """The numbers of a `Tokens` key; none where it is `null`."""
    return tuple(tokens) if isinstance(tokens, list) else () if tokens is None else (tokens,)


class CommonKeys(Struct, kw_only=True):
    """What every family says. Rotary positions are read by `rope_keys`."""

    aliases: ClassVar[dict[str, str]] = {}
    """Other names that transformers takes for a key."""
    required: ClassVar[tuple[str, ...]] = ()
    """Keys that must be there although they have a default, which is another class's."""
    default_theta: ClassVar[float] = 10000.0
    """The class's base of rotary frequencies."""
    default_fraction: ClassVar[float | None] = None
    """The class's part of each head that is rotated; `None` where it knows whole heads alone."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = False
    eos_token_id: Tokens = None


class _DeepseekKeys(CommonKeys, kw_only=True):
    """What DeepSeek-V2 and V3 say alike."""

    num_experts_per_tok: Experts
    q_lora_rank: Size | None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    moe_intermediate_size: Size
    n_routed_experts: Experts
    attention_bias: bool = False
    moe_layer_freq: Literal[1] | None = 1


class DeepseekV2Keys(_DeepseekKeys, kw_only=True):
    """`DeepseekV2Config`."""

    aliases: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}

    n_shared_experts: Count | None = 2
    first_k_dense_replace: Count = 0
    routed_scaling_factor: Factor = 1.0
    n_group: Experts | None = None
    topk_group: Experts | None = None
    scoring_func: Literal["softmax"] | None = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy"] | None = "greedy"
    mlp_bias: bool = False
    eos_token_id: Tokens = 2


class DeepseekV3Keys(_DeepseekKeys, kw_only=True):
    """`DeepseekV3Config`."""

    aliases: ClassVar[dict[str, str]] = {
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    n_shared_experts: Count | None = 1
    first_k_dense_replace: Count = 3
    routed_scaling_factor: Factor = 2.5
    n_group: Experts = 8
    topk_group: Experts = 4
    norm_topk_prob: bool = True
    rope_interleave: bool = True
    num_nextn_predict_layers: Count | None = 1
    scoring_func: Literal["sigmoid"] | None = "sigmoid"
    topk_method: Literal["noaux_tc"] | None = "noaux_tc"
    eos_token_id: Tokens = 1


class KimiK2Keys(DeepseekV3Keys, kw_only=True):
    """Kimi-K2's own class, which lies beside its weights: nothing is assumed of its defaults."""

    required: ClassVar[tuple[str, ...]] = (
        "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "n_group",
        "topk_group", "norm_topk_prob", "num_nextn_predict_layers", "rms_norm_eps",
    )  # fmt: skip

    eos_token_id: Tokens = None


class Glm4MoeKeys(CommonKeys, kw_only=True):
    """`Glm4MoeConfig`."""

    aliases: ClassVar[dict[str, str]] = {
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    default_fraction: ClassVar[float | None] = 0.5

    num_experts_per_tok: Experts
    moe_intermediate_size: Size
    n_routed_experts: Experts
    num_key_value_heads: Size = 8
    head_dim: Size | None = None
    attention_bias: bool = False
    use_qk_norm: bool = False
    n_shared_experts: Count = 1
    first_k_dense_replace: Count = 1
    routed_scaling_factor: Factor = 1.0
    n_group: Experts = 1
    topk_group: Experts = 1
    norm_topk_prob: bool = True
    num_nextn_predict_layers: Count = 1
    rms_norm_eps: Epsilon = 1e-5


class Qwen3MoeKeys(CommonKeys, kw_only=True):
    """`Qwen3MoeConfig`."""

    aliases: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}

    num_experts: Experts
    num_experts_per_tok: Experts
    moe_intermediate_size: Size
    num_key_value_heads: Size | None = 4
    head_dim: Size | None = None
    norm_topk_prob: bool = False
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    decoder_sparse_step: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 1
    mlp_only_layers: _LayerNumbers = None


class MixtralKeys(CommonKeys, kw_only=True):
    """`MixtralConfig`."""

    aliases: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
    default_theta: ClassVar[float] = 1e6

    num_local_experts: Experts
    num_experts_per_tok: Experts
    num_key_value_heads: Size | None = 8
    head_dim: Size | None = None
    sliding_window: int | None = None
    attention_bias: Literal[False] | None = False
    rms_norm_eps: Epsilon = 1e-5
    eos_token_id: Tokens = 2


class Qwen3Keys(CommonKeys, kw_only=True):
    """`Qwen3Config`. A window there holds for the upper layers only, which is not computed here."""

    num_key_value_heads: Size | None = 32
    head_dim: Size | None = 128
    attention_bias: bool = False
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None


class LlamaKeys(CommonKeys, kw_only=True):
    """`LlamaConfig`."""

    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_id: Tokens = 2
