"""A model as a Hugging Face checkpoint folder: config.json and safetensors, sharded if large.

Tensors are taken from the model and written one at a time.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from cmjax.models.moe.checkpoint import block_fp8
from cmjax.models.moe.checkpoint.hf_config import config_json
from cmjax.models.moe.checkpoint.load import INDEX
from cmjax.models.moe.checkpoint.safetensor_file import Spec, write_tensors
from cmjax.models.moe.checkpoint.tensor_names import Entry, entries
from cmjax.models.moe.model import MoEModel, parameters

StoredType = Literal["float32", "bfloat16", "float16", "float8"]
_BLOCK = (128, 128)
_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8": ml_dtypes.float8_e4m3fn,
}


@dataclasses.dataclass(frozen=True)
class _Planned:
    """One tensor of a file to be written."""

    entry: Entry
    spec: Spec
    part: Literal["values", "fp8 values", "fp8 scales"] = "values"


def save(
    model: MoEModel,
    path: str | Path,
    *,
    dtype: StoredType | None = None,
    most_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as a checkpoint that `load` and transformers read.

    Args:
      model: a one-rank model, float32 or bfloat16.
      path: folder, made if need be; it must not hold a checkpoint already.
      dtype: type of all tensors but the router's correction bias (F32); `float8` is block-FP8 as
        DeepSeek-V3 publishes it, with norms, embedding, head and routers in BF16. `None` keeps what
        each parameter has in the model.
      most_bytes: a file holds at most this much (or one tensor); more than one get an index.
    Raises:
      ValueError: a model with few-bit weights, one that its family's config.json cannot describe,
        an unknown dtype, or a folder with weights in it.
    """
    config, folder = model.config, Path(path)
    if model.arithmetic.quantized:
        raise ValueError("save: a model of few-bit weights holds rounded ones; save the float one")
    if dtype is not None and dtype not in _TYPES:
        raise ValueError(f"save: dtype must be one of {', '.join(_TYPES)} or None, got {dtype!r}")
    if folder.exists() and any(folder.glob("*.safetensors*")):
        raise ValueError(f"save: {folder} already holds a checkpoint; choose another folder")
    raw, params = config_json(config), parameters(model)
    raw["dtype"] = raw["torch_dtype"] = (
        model.arithmetic.projections
        if dtype is None
        else "bfloat16"
        if dtype == "float8"
        else dtype
    )
    if dtype == "float8":
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(_BLOCK),
        }
    planned: dict[str, _Planned] = {}
    for entry in entries(config, mtp=model.mtp is not None):
        planned |= _plan(entry, _at(params, entry.paths[0]).dtype, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    files = _files(planned, most_bytes)
    for file, names in files.items():
        specs = {name: planned[name].spec for name in names}
        write_tensors(folder / file, specs, _tensors(params, planned, names))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(item.spec.nbytes for item in planned.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _plan(entry: Entry, held: Any, dtype: StoredType | None) -> dict[str, _Planned]:
    """The tensors of a file that hold an entry."""
    router_or_end = {"embed", "head", "router", "project"} & set(entry.paths[0])
    if entry.paths[0][-2:] == ("router", "bias"):
        return {entry.name: _Planned(entry, Spec(np.float32, entry.shape))}
    if dtype == "float8" and entry.form.kind != "as is" and not router_or_end:
        scales = Spec(np.float32, block_fp8.scale_shape(entry.shape, _BLOCK))
        return {
            entry.name: _Planned(entry, Spec(_TYPES[dtype], entry.shape), "fp8 values"),
            entry.name + block_fp8.SCALE_SUFFIX: _Planned(entry, scales, "fp8 scales"),
        }
    stored = held if dtype is None else _TYPES["bfloat16" if dtype == "float8" else dtype]
    return {entry.name: _Planned(entry, Spec(stored, entry.shape))}


def _files(planned: dict[str, _Planned], most_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors of each file, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, item in planned.items():
        if groups[-1] and size + item.spec.nbytes > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += item.spec.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}


def _tensors(
    params: dict[str, Any], planned: dict[str, _Planned], names: Sequence[str]
) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        item = planned[name]
        tensor = item.entry.form.join(*(_taken(params, item.entry, p) for p in item.entry.paths))
        if item.part != "values":
            both = jax.jit(block_fp8.quantize, static_argnums=1)(tensor, _BLOCK)
            tensor = both[item.part == "fp8 scales"]
        yield name, np.asarray(tensor.astype(item.spec.dtype))


def _taken(params: dict[str, Any], entry: Entry, path: tuple[str, ...]) -> jax.Array:
    """The part of a parameter that an entry is."""
    expert = () if entry.expert is None or entry.expert < 0 else (entry.expert,)
    value = _at(params, path)[(*entry.index, *expert)]
    if entry.form.kind == "up-projection":
        return value
    # of joined columns, the file's first axis says how many are this tensor's
    width = entry.shape[0] if path[-1] in ("weight", "bias") else value.shape[-1]
    return value[..., entry.column : entry.column + width]


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
