"""Mixture-of-experts transformers (DeepSeek-V2 and V3, GLM-4.5, Qwen3-MoE, Mixtral) and dense ones
(Qwen3, Llama), as one rank holds them; real weights in and out.

    from cmjax.models import moe
    model = moe.load("path/of/a/checkpoint")                     # or moe.from_config(moe.tiny())
    logits = model(tokens)                                       # [sequences, length, vocab]
    texts = moe.generate("path/of/a/checkpoint", ["The cat"], 32, mesh=RankMesh(2, 4))
"""

from cmjax.models.moe.arithmetic import ARITHMETICS, Arithmetic
from cmjax.models.moe.checkpoint import (
    Checkpoint,
    load,
    load_config,
    load_params,
    open_checkpoint,
    read_config,
    save,
)
from cmjax.models.moe.config import GroupedAttention, LatentAttention, MoEConfig
from cmjax.models.moe.generation import (
    ChatTemplate,
    Completion,
    ContinuousBatch,
    Generated,
    Generator,
    GeneratorOptions,
    Sampler,
    encode_prompt,
    generate,
    open_generator,
    open_tokenizer,
    place_params,
    read_chat_template,
)
from cmjax.models.moe.layers import extend_cache, quantize_params
from cmjax.models.moe.model import MoEModel, convert_params, from_config
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.presets import PRESETS, deepseek_r1, deepseek_v3, tiny
from cmjax.models.moe.schedule import Schedule, overlapped_exchange, two_stream_decode
from cmjax.models.moe.sharding import param_specs, shard_params
from cmjax.models.moe.slots import SlotTable, ep_table, plan_tables, published_table
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
    "ChatTemplate",
    "Checkpoint",
    "Completion",
    "ContinuousBatch",
    "DecodeInputs",
    "DecodeOutput",
    "Generated",
    "Generator",
    "GeneratorOptions",
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
    "encode_prompt",
    "ep_table",
    "extend_cache",
    "from_config",
    "generate",
    "init_params",
    "load",
    "load_config",
    "load_params",
    "one_rank",
    "open_checkpoint",
    "open_generator",
    "open_tokenizer",
    "overlapped_exchange",
    "param_specs",
    "place_params",
    "plan_tables",
    "prefill_fn",
    "published_table",
    "quantize_params",
    "read_chat_template",
    "read_config",
    "save",
    "shard_params",
    "tiny",
    "two_stream_decode",
]
