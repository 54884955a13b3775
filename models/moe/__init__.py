"""Mixture-of-experts transformers (DeepSeek-V2 and V3, Qwen3-MoE, Mixtral), as one rank holds
them; real weights in and out."""

from cmjax.models.moe.arithmetic import ARITHMETICS, Arithmetic
from cmjax.models.moe.checkpoint.hf_config import load_config, read_config
from cmjax.models.moe.checkpoint.load import Checkpoint, load, load_params, open_checkpoint
from cmjax.models.moe.checkpoint.save import save
from cmjax.models.moe.config import (
    PRESETS,
    GroupedAttention,
    LatentAttention,
    MoEConfig,
    deepseek_r1,
    deepseek_v3,
    tiny,
)
from cmjax.models.moe.generation.batch import Sampler
from cmjax.models.moe.generation.generator import Generator
from cmjax.models.moe.generation.programs import place_params
from cmjax.models.moe.layers.cache import extend_cache
from cmjax.models.moe.layers.linear import quantize_params
from cmjax.models.moe.model import MoEModel, convert_params
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.schedule import Schedule, two_stream_decode
from cmjax.models.moe.sharding import param_specs, shard_params
from cmjax.models.moe.slots import SlotTable, ep_table
from cmjax.models.moe.steps import (
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
    "MoEConfig",
    "MoEModel",
    "Parallelism",
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
