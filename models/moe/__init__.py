"""Mixture-of-experts transformers (DeepSeek-V2 and V3, Qwen3-MoE, Mixtral), as one rank holds
them; real weights in and out."""

from models.moe.arithmetic import ARITHMETICS, Arithmetic
from models.moe.batch import Sampler
from models.moe.cache import extend_cache
from models.moe.checkpoint import Checkpoint, load, load_params, open_checkpoint
from models.moe.config import (
    PRESETS,
    GroupedAttention,
    LatentAttention,
    MoEConfig,
    deepseek_r1,
    deepseek_v3,
    tiny,
)
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
from models.moe.export import save
from models.moe.generation import Generator
from models.moe.hf_config import load_config, read_config
from models.moe.layout import Layout, one_rank, param_specs, shard_params
from models.moe.linear import quantize_params
from models.moe.model import MoEModel, convert_params
from models.moe.placement import SlotTable, ep_table
from models.moe.programs import place_params
from models.moe.schedule import Schedule, two_stream_decode

__all__ = [
    "ARITHMETICS",
    "PRESETS",
    "Arithmetic",
    "Checkpoint",
    "DecodeInputs",
    "DecodeOutput",
    "Generator",
    "GroupedAttention",
    "LatentAttention",
    "Layout",
    "MoEConfig",
    "MoEModel",
    "PrefillInputs",
    "PrefillOutput",
    "RankStep",
    "Sampler",
    "Sampling",
    "Schedule",
    "SlotTable",
    "abstract_decode",
    "abstract_params",
    "abstract_prefill",
    "convert_params",
    "decode_fn",
    "deepseek_r1",
    "deepseek_v3",
    "ep_table",
    "extend_cache",
    "init_params",
    "load",
    "load_config",
    "load_params",
    "one_rank",
    "open_checkpoint",
    "param_specs",
    "place_params",
    "prefill_fn",
    "quantize_params",
    "read_config",
    "save",
    "shard_params",
    "tiny",
    "two_stream_decode",
]
