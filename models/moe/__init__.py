"""Mixture-of-experts transformers of the DeepSeek-V3 family, as one rank holds them."""

from models.moe.cache import extend_cache
from models.moe.checkpoint import load_checkpoint
from models.moe.config import PRESETS, MoEConfig, deepseek_r1, deepseek_v3, load_config, tiny
from models.moe.deepseek import (
    DecodeInputs,
    DecodeOutput,
    PrefillInputs,
    PrefillOutput,
    RankStep,
    Sampling,
    abstract_decode,
    abstract_params,
    abstract_prefill,
    decode_fn,
    init_params,
    prefill_fn,
)
from models.moe.layout import Layout, one_rank, param_specs, shard_params
from models.moe.linear import quantize_params
from models.moe.placement import SlotTable, ep_table
from models.moe.schedule import Schedule, two_stream_decode

__all__ = [
    "PRESETS",
    "DecodeInputs",
    "DecodeOutput",
    "Layout",
    "MoEConfig",
    "PrefillInputs",
    "PrefillOutput",
    "RankStep",
    "Sampling",
    "Schedule",
    "SlotTable",
    "abstract_decode",
    "abstract_params",
    "abstract_prefill",
    "decode_fn",
    "deepseek_r1",
    "deepseek_v3",
    "ep_table",
    "extend_cache",
    "init_params",
    "load_checkpoint",
    "load_config",
    "one_rank",
    "param_specs",
    "prefill_fn",
    "quantize_params",
    "shard_params",
    "tiny",
    "two_stream_decode",
]
