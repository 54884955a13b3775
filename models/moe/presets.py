"""Published models by name, and a tiny one.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 4.2, and the published
config.json of each model.
"""

import dataclasses
from collections.abc import Callable

from cmjax.models.moe.config import GroupedAttention, LatentAttention, MoEConfig, dense_config
from cmjax.models.moe.positions import Llama3Scaling, Rope, YarnConfig


def deepseek_v3() -> MoEConfig:
    """DeepSeek-V3: 671B parameters, 37B active per token, one MTP module."""
    return MoEConfig(
        vocab_size=129280,
        hidden_size=7168,
        layers=61,
        dense_layers=tuple(range(3)),
        heads=128,
        attention=LatentAttention(
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_dim=128,
            qk_rope_dim=64,
            v_dim=128,
        ),
        ffn_size=18432,
        expert_ffn_size=2048,
        routed_experts=256,
        shared_experts=1,
        experts_per_token=8,
        expert_groups=8,
        groups_per_token=4,
        routed_scale=2.5,
        rope=Rope(
            scaling=YarnConfig(
                factor=40.0, original_max_position=4096, mscale=1.0, mscale_all_dim=1.0
            )
        ),
        max_position=163840,
        mtp_layers=1,
        end_tokens=(1,),
    )


def deepseek_r1() -> MoEConfig:
    """DeepSeek-R1: the sizes of DeepSeek-V3, other weights."""
    return deepseek_v3()


def kimi_k2() -> MoEConfig:
    """Kimi-K2: DeepSeek-V3's form with 384 experts and 64 heads; 1T parameters, 32B active.

    The published config has no draft module. One of the form of DeepSeek-V3's stands here for those
    that deployments of Kimi-K2.5 (which has these sizes) draft with.
    """
    return dataclasses.replace(
        deepseek_v3(),
        vocab_size=163840,
        dense_layers=(0,),
        heads=64,
        routed_experts=384,
        expert_groups=1,
        groups_per_token=1,
        routed_scale=2.827,
        rope=Rope(
            theta=50000.0,
            scaling=YarnConfig(
                factor=32.0,
                original_max_position=4096,
                beta_fast=1.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
        max_position=131072,
        end_tokens=(163585,),
    )


def glm_4_7() -> MoEConfig:
    """GLM-4.7: 355B parameters, 32B active per token, one MTP module.

    GLM-4.6 is the same, GLM-4.5 too but for its context of 131,072. Sizes: GLM-4.5 Team, "GLM-4.5:
    Agentic, Reasoning, and Coding (ARC) Foundation Models" (2025), table 1; they give the counts of
    parameters that are published. The longest context and the base of the rotary frequencies are
    from memory of the published config.json, and change no price.
    """
    return dataclasses.replace(
        glm_4_5_air(),
        hidden_size=5120,
        layers=92,
        dense_layers=tuple(range(3)),
        attention=GroupedAttention(kv_heads=8, head_dim=128, qk_norm=True, bias=True),
        ffn_size=12288,
        expert_ffn_size=1536,
        routed_experts=160,
        routed_scale=2.5,
        max_position=202752,
    )


def glm_4_5_air() -> MoEConfig:
    """GLM-4.5-Air: 106B parameters, 12B active per token, one MTP module.

    Sizes: as of GLM-4.5, and the defaults of `Glm4MoeConfig` in Hugging Face transformers.
    """
    return MoEConfig(
        vocab_size=151552,
        hidden_size=4096,
        layers=46,
        dense_layers=(0,),
        heads=96,
        attention=GroupedAttention(kv_heads=8, head_dim=128, bias=True),
        ffn_size=10944,
        expert_ffn_size=1408,
        routed_experts=128,
        shared_experts=1,
        experts_per_token=8,
        expert_groups=1,
        groups_per_token=1,
        norm_eps=1e-5,
        rope=Rope(theta=1e6, fraction=0.5, interleave=False),
        max_position=131072,
        mtp_layers=1,
        end_tokens=(151329, 151336, 151338),
        family="glm4_moe",
    )


def qwen3_30b_a3b() -> MoEConfig:
    """Qwen3-30B-A3B: 128 experts of 768, 8 of them per token, none shared."""
    return MoEConfig(
        vocab_size=151936,
        hidden_size=2048,
        layers=48,
        dense_layers=(),
        heads=32,
        attention=GroupedAttention(kv_heads=4, head_dim=128, qk_norm=True),
        ffn_size=6144,
        expert_ffn_size=768,
        routed_experts=128,
        shared_experts=0,
        experts_per_token=8,
        expert_groups=1,
        groups_per_token=1,
        scoring="softmax",
        score_bias=False,
        group_best=1,
        rope=Rope(theta=1e6, interleave=False),
        max_position=40960,
        end_tokens=(151645,),
        family="qwen3_moe",
    )


def qwen3_235b_a22b() -> MoEConfig:
    """Qwen3-235B-A22B: 128 experts of 1,536, 8 of them per token, none shared."""
    return dataclasses.replace(
        qwen3_30b_a3b(),
        hidden_size=4096,
        layers=94,
        heads=64,
        ffn_size=12288,
        expert_ffn_size=1536,
    )


def qwen3_8b() -> MoEConfig:
    """Qwen3-8B, a dense model."""
    return dense_config(
        vocab_size=151936,
        hidden_size=4096,
        layers=36,
        heads=32,
        attention=GroupedAttention(kv_heads=8, head_dim=128, qk_norm=True),
        ffn_size=12288,
        rope=Rope(theta=1e6, interleave=False),
        max_position=40960,
        end_tokens=(151645,),
        family="qwen3",
    )


def qwen3_32b() -> MoEConfig:
    """Qwen3-32B, a dense model."""
    return _resized(qwen3_8b(), hidden_size=5120, layers=64, heads=64, ffn_size=25600)


def llama3_8b() -> MoEConfig:
    """Llama-3.1-8B, a dense model."""
    return dense_config(
        vocab_size=128256,
        hidden_size=4096,
        layers=32,
        heads=32,
        attention=GroupedAttention(kv_heads=8, head_dim=128),
        ffn_size=14336,
        norm_eps=1e-5,
        rope=Rope(
            theta=5e5,
            interleave=False,
            scaling=Llama3Scaling(
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position=8192,
            ),
        ),
        max_position=131072,
        end_tokens=(128001,),
        family="llama",
    )


def llama3_70b() -> MoEConfig:
    """Llama-3.1-70B, a dense model."""
    return _resized(llama3_8b(), hidden_size=8192, layers=80, heads=64, ffn_size=28672)


def tiny() -> MoEConfig:
    """A model of every feature that runs anywhere: 3 layers, 16 experts, 64 wide."""
    return MoEConfig(
        vocab_size=320,
        hidden_size=64,
        layers=3,
        dense_layers=(0,),
        heads=8,
        attention=LatentAttention(
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_dim=16,
            qk_rope_dim=8,
            v_dim=16,
        ),
        ffn_size=96,
        expert_ffn_size=32,
        routed_experts=16,
        shared_experts=1,
        experts_per_token=4,
        expert_groups=4,
        groups_per_token=2,
        routed_scale=2.5,
        max_position=256,
        mtp_layers=1,
    )


def _resized(dense: MoEConfig, *, layers: int, ffn_size: int, **sizes: int) -> MoEConfig:
    """A dense model of the same family in other sizes; see `dense_config`."""
    return dataclasses.replace(
        dense,
        layers=layers,
        dense_layers=tuple(range(layers)),
        ffn_size=ffn_size,
        expert_ffn_size=ffn_size,
        **sizes,
    )


PRESETS: dict[str, Callable[[], MoEConfig]] = {
    "deepseek-r1": deepseek_r1,
    "deepseek-v3": deepseek_v3,
    "glm-4.5-air": glm_4_5_air,
    "glm-4.7": glm_4_7,
    "kimi-k2": kimi_k2,
    "llama3-70b": llama3_70b,
    "llama3-8b": llama3_8b,
    "qwen3-235b-a22b": qwen3_235b_a22b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "qwen3-32b": qwen3_32b,
    "qwen3-8b": qwen3_8b,
    "tiny": tiny,
}
"""Name of a preset -> the function that makes it."""
