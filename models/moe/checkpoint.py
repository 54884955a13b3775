"""Hugging Face checkpoints of the DeepSeek-V3 family as parameters of the one-rank model.

Reads safetensors files (and sharded ones, by their index) without further packages. Weights are
turned from [out, in] to [in, out]; experts and layers are stacked.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.moe.config import MoEConfig
from models.moe.placement import one_rank_table

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
}

Read = Callable[[str], np.ndarray]


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Tensors of one file by name, memory-mapped.

    Raises:
      ValueError: the file is truncated or holds a type this reader does not know; names both.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path}: not a safetensors file, or truncated ({size} bytes)")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, mode="r", offset=8 + length)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has type {entry['dtype']}; this reader knows "
                f"{', '.join(_DTYPES)}. Convert block-quantised FP8 checkpoints to BF16 first"
            )
        start, end = entry["data_offsets"]
        if end > data.size:
            raise ValueError(f"{path}: truncated, tensor {name!r} ends beyond the file")
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        tensors[name] = data[start:end].view(dtype).reshape(entry["shape"])
    return tensors


def load_checkpoint(
    folder: str | Path, config: MoEConfig, *, mtp: bool = False, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Parameters for `init_params(config, "float32", mtp=mtp)`'s tree, from a checkpoint folder.

    Raises:
      ValueError: no weights in the folder, a tensor missing or of the wrong shape; names it.
    """
    read = _reader(Path(folder), dtype)
    moe_layers = range(config.dense_layers, config.layers)
    main: dict[str, Any] = {
        "embed": read("model.embed_tokens.weight"),
        "norm": {"gain": read("model.norm.weight").astype(jnp.float32)},
        "head": {"weight": read("lm_head.weight").T},
        "moe": _stack([_moe_layer(read, config, i) for i in moe_layers]),
    }
    if config.dense_layers:
        main["dense"] = _stack([_dense_layer(read, config, i) for i in range(config.dense_layers)])
    params = {"main": main}
    if mtp:
        prefix = f"model.layers.{config.layers}"
        params["mtp"] = {
            "norm_embed": {"gain": read(f"{prefix}.enorm.weight")},
            "norm_hidden": {"gain": read(f"{prefix}.hnorm.weight")},
            "project": {"weight": read(f"{prefix}.eh_proj.weight").T},
            "stack": _stack([_moe_layer(read, config, config.layers)]),
            "norm": {"gain": read(f"{prefix}.shared_head.norm.weight")},
        }
    return params


def _reader(folder: Path, dtype: Any) -> Read:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no .safetensors file in this folder")
    tensors: Mapping[str, np.ndarray] = {}
    for file in files:
        tensors = {**tensors, **read_safetensors(file)}

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{folder}: the checkpoint has no tensor {name!r}")
        return np.asarray(tensors[name]).astype(dtype)

    return read


def _attention(read: Read, config: MoEConfig, layer: int) -> dict[str, Any]:
    prefix = f"model.layers.{layer}"
    attention = f"{prefix}.self_attn"
    up = read(f"{attention}.kv_b_proj.weight")
    up = up.reshape(config.heads, config.qk_nope_dim + config.v_dim, config.kv_lora_rank)
    return {
        "norm": read(f"{prefix}.input_layernorm.weight"),
        "q_a": {"weight": read(f"{attention}.q_a_proj.weight").T},
        "q_norm": read(f"{attention}.q_a_layernorm.weight"),
        "q_b": {"weight": read(f"{attention}.q_b_proj.weight").T},
        "kv_a": {"weight": read(f"{attention}.kv_a_proj_with_mqa.weight").T},
        "kv_norm": read(f"{attention}.kv_a_layernorm.weight"),
        "up_key": up[:, : config.qk_nope_dim],
        "up_value": up[:, config.qk_nope_dim :].swapaxes(1, 2),
        "out": {"weight": read(f"{attention}.o_proj.weight").T},
    }


def _swiglu(read: Read, prefix: str) -> dict[str, Any]:
    gate, up = read(f"{prefix}.gate_proj.weight"), read(f"{prefix}.up_proj.weight")
    return {
        "gate_up": {"weight": np.concatenate([gate, up]).T},
        "down": {"weight": read(f"{prefix}.down_proj.weight").T},
    }


def _dense_layer(read: Read, config: MoEConfig, layer: int) -> dict[str, Any]:
    prefix = f"model.layers.{layer}"
    return {
        "attention": _attention(read, config, layer),
        "norm": {"gain": read(f"{prefix}.post_attention_layernorm.weight")},
        "ffn": _swiglu(read, f"{prefix}.mlp"),
    }


def _moe_layer(read: Read, config: MoEConfig, layer: int) -> dict[str, Any]:
    prefix = f"model.layers.{layer}"
    slots, copies = one_rank_table(config.experts).arrays()
    experts = [_swiglu(read, f"{prefix}.mlp.experts.{e}") for e in range(config.experts)]
    moe = {
        "norm": {"gain": read(f"{prefix}.post_attention_layernorm.weight")},
        "router": {
            "weight": read(f"{prefix}.mlp.gate.weight").T.astype(jnp.float32),
            "bias": read(f"{prefix}.mlp.gate.e_score_correction_bias").astype(jnp.float32),
        },
        "slots_of_expert": slots,
        "copies": copies,
        "experts": _stacked(experts),
    }
    if config.shared_experts:
        moe["shared"] = _swiglu(read, f"{prefix}.mlp.shared_experts")
    return {"attention": _attention(read, config, layer), "moe": moe}


def _stack(layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"layers": _stacked(layers)}


def _stacked(trees: list[Any]) -> Any:
    if isinstance(trees[0], dict):
        return {key: _stacked([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)
