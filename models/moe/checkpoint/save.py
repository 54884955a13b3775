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

from cmjax.files import replace_text
from cmjax.models.moe.checkpoint import block_fp8
from cmjax.models.moe.checkpoint.folder import INDEX
from cmjax.models.moe.checkpoint.hf_config import config_json
from cmjax.models.moe.checkpoint.safetensor_file import TensorSpec, write_tensors
from cmjax.models.moe.checkpoint.tensor_names import WeightMapping, weight_mappings
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

    mapping: WeightMapping
    spec: TensorSpec
    part: Literal["values", "fp8 values", "fp8 scales"] = "values"


def save(
    model: MoEModel,
    path: str | Path,
    *,
    dtype: StoredType | None = None,
    most_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as a checkpoint that `load` and transformers read.

        >>> import tempfile
        >>> from cmjax.models import moe
        >>> folder = Path(tempfile.mkdtemp())
        >>> moe.save(moe.from_config(moe.tiny()), folder, dtype="bfloat16")
        >>> sorted(file.name for file in folder.iterdir())
        ['config.json', 'model.safetensors']

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
    for mapping in weight_mappings(config, mtp=model.mtp is not None):
        planned |= _plan(mapping, _at(params, mapping.paths[0]).dtype, dtype)
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
        replace_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    replace_text(folder / "config.json", json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _plan(mapping: WeightMapping, held: Any, dtype: StoredType | None) -> dict[str, _Planned]:
    """The tensors of a file that hold a weight."""
    router_or_end = {"embed", "head", "router", "project"} & set(mapping.paths[0])
    if mapping.paths[0][-2:] == ("router", "bias"):
        return {mapping.name: _Planned(mapping, TensorSpec(np.float32, mapping.shape))}
    if dtype == "float8" and mapping.form.kind != "as is" and not router_or_end:
        scales = TensorSpec(np.float32, block_fp8.scale_shape(mapping.shape, _BLOCK))
        return {
            mapping.name: _Planned(mapping, TensorSpec(_TYPES[dtype], mapping.shape), "fp8 values"),
            mapping.name + block_fp8.SCALE_SUFFIX: _Planned(mapping, scales, "fp8 scales"),
        }
    stored = held if dtype is None else _TYPES["bfloat16" if dtype == "float8" else dtype]
    return {mapping.name: _Planned(mapping, TensorSpec(stored, mapping.shape))}


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
        tensor = item.mapping.form.join(
            *(_taken(params, item.mapping, p) for p in item.mapping.paths)
        )
        if item.part != "values":
            both = jax.jit(block_fp8.quantize, static_argnums=1)(tensor, _BLOCK)
            tensor = both[item.part == "fp8 scales"]
        yield name, np.asarray(tensor.astype(item.spec.dtype))


def _taken(params: dict[str, Any], mapping: WeightMapping, path: tuple[str, ...]) -> jax.Array:
    """The part of a parameter that a tensor of the file is."""
    expert = () if mapping.expert is None or mapping.expert < 0 else (mapping.expert,)
    value = _at(params, path)[(*mapping.index, *expert)]
    if mapping.form.kind == "up-projection":
        return value
    # of joined columns, the file's first axis says how many are this tensor's
    width = mapping.shape[0] if path[-1] in ("weight", "bias") else value.shape[-1]
    return value[..., mapping.column : mapping.column + width]


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
