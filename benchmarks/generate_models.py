"""The models that `benchmarks.generate` runs, and the bytes that a decode step has to read.

Both have random weights, as large as a cache is small: a step reads them from memory.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

import jax

from cmjax.models import moe
from cmjax.models.moe.layers.cache import empty_cache
from cmjax.models.moe.parallelism import one_rank
from cmjax.models.moe.steps import abstract_params

Family = Literal["qwen", "deepseek"]
QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "rope_theta": 10000.0,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
PEER_BITS = {"float32": 32.0, "bfloat16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5}
"""Bits of a weight, with its share of a block's scale."""


def write_model(family: Family, folder: Path, layers: int | None = None) -> moe.MoEConfig:
    """A checkpoint of random weights that this library, transformers and the GGUF writer read.

    Args:
      layers: fewer than the model's own, for a quick run.
    """
    sizes = QWEN if family == "qwen" else DEEPSEEK
    if layers is not None:
        sizes = sizes | {"num_hidden_layers": layers}
    path = folder / "config.json"
    path.write_text(json.dumps(sizes))
    config = moe.load_config(path)
    moe.save(moe.from_config(config), folder)
    return config


def step_bytes(config: moe.MoEConfig, system: str, batch: int, context: int) -> float:
    """Bytes that a decode step of `batch` requests reads: every weight that is touched once (of
    experts, as many as are expected to be used) and the cache of `context` tokens.

    Args:
      system: "cmjax ARITHMETIC", or a peer and the format of its weights.
    """
    kind, form = system.split()
    own = kind == "cmjax"
    arithmetic = moe.Arithmetic.of(form if own else "float32")
    cache = jax.eval_shape(lambda: empty_cache(config, batch, context, arithmetic.kv_cache))
    weights = abstract_params(config, one_rank(config), arithmetic)["main"]
    unused = (1 - config.experts_per_token / config.routed_experts) ** batch

    def touched(path: Any, leaf: Any) -> float:
        keys = {getattr(entry, "key", None) for entry in path}
        size = math.prod(leaf.shape) * _bytes_each(leaf, None if own else form)
        if "embed" in keys:
            return size * batch / config.vocab_size
        return size * (1 - unused) if "experts" in keys else size

    total = sum(touched(*each) for each in jax.tree_util.tree_leaves_with_path(weights))
    kept = "float16" if kind == "llama.cpp" else None if own else form
    return total + sum(math.prod(x.shape) * _bytes_each(x, kept) for x in jax.tree.leaves(cache))


def _bytes_each(leaf: Any, form: str | None) -> float:
    if form is None:
        return leaf.dtype.itemsize
    return 2.0 if form == "float16" else PEER_BITS[form] / 8
