"""Hugging Face checkpoints (config.json and safetensors) as models.

    model = load("path/of/a/checkpoint")       # an NNX module on one device

Loading checks every name, type and shape from the files' headers before it reads a value. Then it
goes tensor by tensor straight to where the values live: a parameter's buffer is made on its device
once, each tensor is written into it in place, and at most one tensor at a time is in host memory.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from cmjax.console import Progress
from cmjax.mesh import RankMesh
from cmjax.models.moe.arithmetic import Precision
from cmjax.models.moe.checkpoint import block_fp8
from cmjax.models.moe.checkpoint.buffers import ParameterBuffers
from cmjax.models.moe.checkpoint.hf_config import parse_config, read_json
from cmjax.models.moe.checkpoint.safetensor_file import StoredTensor, list_tensors
from cmjax.models.moe.checkpoint.tensor_names import (
    WeightMapping,
    is_known,
    mtp_marker,
    weight_mappings,
)
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.model import MoEModel, abstract_model, assemble
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.sharding import layer_tables
from cmjax.models.moe.slots import SlotTable

INDEX = "model.safetensors.index.json"
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder's config and the places of its tensors; no values."""

    folder: Path
    config: MoEConfig
    tensors: dict[str, StoredTensor]
    block: block_fp8.Block
    """Rows and columns that share a scale in FP8 matrices."""

    @property
    def has_mtp(self) -> bool:
        """Whether it holds the weights of a multi-token-prediction module."""
        return self.config.mtp_layers > 0 and mtp_marker(self.config) in self.tensors


def load(
    path: str | Path,
    *,
    precision: Precision = "float32",
    mtp: bool | None = None,
    progress: Progress | None = None,
) -> MoEModel:
    """A model from a checkpoint folder, on the default device.

        >>> import tempfile
        >>> from cmjax.models import moe
        >>> folder = tempfile.mkdtemp()
        >>> moe.save(moe.from_config(moe.tiny()), folder)
        >>> moe.load(folder).config.routed_experts
        16

    Reads DeepSeek-V2, DeepSeek-V3 (R1, Kimi-K2), Qwen3-MoE and Mixtral; F32, F16, BF16 and
    block-FP8 (E4M3 with `weight_scale_inv`).

    Args:
      path: folder with config.json and model.safetensors, or shards and their index.
      precision: what the model computes in; weights are converted as they are read.
      mtp: whether to load the draft module; `None`: if the checkpoint has one.
      progress: called with the bytes read so far, in all, and what is being done.
    Raises:
      ValueError: something is missing, truncated, unknown or of the wrong shape; names it. Nothing
        is read before everything is known to be there.
    """
    checkpoint = open_checkpoint(path)
    mtp = checkpoint.has_mtp if mtp is None else mtp
    parallelism = one_rank(checkpoint.config)
    graph, _ = abstract_model(checkpoint.config, parallelism, precision, mtp=mtp)
    return assemble(
        graph, load_params(checkpoint, parallelism, precision=precision, mtp=mtp, progress=progress)
    )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read a folder's config.json, index and headers.

    Raises: ValueError: see `load`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a checkpoint is one with a config.json")
    raw, file = read_json(folder)
    config = parse_config(raw, file)
    quantization = raw.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method not in (None, "fp8"):
        raise ValueError(
            f"{file}: quantization_config has quant_method {method!r}; this reader knows 'fp8' "
            "(block-wise) and unquantized weights"
        )
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    return Checkpoint(folder, config, _listed(folder), (int(rows), int(columns)))


def load_params(
    checkpoint: Checkpoint,
    parallelism: Parallelism,
    *,
    precision: Precision = "float32",
    mtp: bool = False,
    mesh: RankMesh | None = None,
    tables: Sequence[SlotTable] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Parameters of `parallelism`'s model, as `shard_params` would give them.

    Args:
      mesh: the ranks; each tensor goes to the devices whose ranks hold it. `None` for one rank,
        without a mesh.
      tables: one per MoE layer (then one for the MTP layer, if it is loaded); by default
        `parallelism.table` for all.
    Raises: ValueError: see `load`; or tables that do not fit `parallelism.table`.
    """
    config = checkpoint.config
    if precision not in get_args(Precision):
        raise ValueError(
            f"load_params: weights are read as {', '.join(get_args(Precision))}, got "
            f"{precision!r}; for another arithmetic read floats and convert them"
        )
    wanted = list(weight_mappings(config, mtp=mtp))
    _check(checkpoint, wanted, mtp)
    tables = layer_tables(parallelism, config.moe_layers + mtp, tables)
    buffers = ParameterBuffers(config, parallelism, precision, mtp, mesh)
    total = sum(checkpoint.tensors[mapping.name].nbytes for mapping in wanted)
    done = 0
    for mapping in wanted:
        stored = checkpoint.tensors[mapping.name]
        scale = checkpoint.tensors.get(mapping.name + block_fp8.SCALE_SUFFIX)
        values = stored.read(), None if scale is None else scale.read()
        buffers.place(mapping, tables, *values, checkpoint.block)
        done += stored.nbytes
        if progress is not None:
            progress(done, total, "loading")
    buffers.place_tables(tables)
    return buffers.finish()


def _listed(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, by its index if it has one."""
    index = folder / INDEX
    if not index.exists():
        whole = folder / "model.safetensors"
        files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: no .safetensors file in this folder")
        found = {}
        for file in files:
            found |= list_tensors(file)
        return found
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index}: no 'weight_map' from tensors to files in it") from None
    files = sorted(set(places.values()))
    absent = [file for file in files if not (folder / file).exists()]
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} of {len(files)} shards that {INDEX} lists are missing: "
            f"{_shortened(absent)}"
        )
    headers = {file: list_tensors(folder / file) for file in files}
    astray = [name for name, file in places.items() if name not in headers[file]]
    if astray:
        raise ValueError(
            f"{folder}: {len(astray)} tensors are not in the shards that {INDEX} names: "
            f"{_shortened(astray)}"
        )
    return {name: headers[file][name] for name, file in places.items()}


def _check(checkpoint: Checkpoint, wanted: list[WeightMapping], mtp: bool) -> None:
    """Everything wanted is there and as it should be, and nothing else is."""
    config, tensors, folder = checkpoint.config, checkpoint.tensors, checkpoint.folder
    if mtp and not checkpoint.has_mtp:
        raise ValueError(
            f"{folder}: no multi-token-prediction weights ({mtp_marker(config)!r} is absent); "
            "load with mtp=False"
        )
    missing = [mapping.name for mapping in wanted if mapping.name not in tensors]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors of this {config.family} model are "
            f"missing: {_shortened(missing)}"
        )
    scales = set()
    for mapping in wanted:
        stored = tensors[mapping.name]
        if stored.shape != mapping.shape:
            raise ValueError(
                f"{stored.path}: tensor {mapping.name!r} has shape {list(stored.shape)}, "
                f"config.json makes it {list(mapping.shape)}"
            )
        if stored.dtype.name not in _FLOATS:
            raise ValueError(
                f"{stored.path}: tensor {mapping.name!r} has type {stored.dtype}; weights are "
                f"{', '.join(_FLOATS)} here"
            )
        scales |= _check_scale(checkpoint, stored)
    listed = {mapping.name for mapping in wanted} | scales
    unknown = [
        name
        for name, stored in tensors.items()
        if name not in listed and stored.nbytes and not is_known(name, config)
    ]
    if unknown:
        raise ValueError(
            f"{folder}: {len(unknown)} tensors have no place in the {config.family} model that "
            f"config.json describes: {_shortened(unknown)}"
        )


def _check_scale(checkpoint: Checkpoint, stored: StoredTensor) -> set[str]:
    """The name of a tensor's FP8 scales, if it has them; they must be there and fit."""
    name = stored.name + block_fp8.SCALE_SUFFIX
    scale = checkpoint.tensors.get(name)
    if stored.dtype.itemsize > 1:
        return set() if scale is None else {name}
    if scale is None or len(stored.shape) != 2:
        raise ValueError(
            f"{stored.path}: FP8 tensor {stored.name!r} of shape {list(stored.shape)} needs "
            f"block scales {name!r}"
        )
    expected = block_fp8.scale_shape(stored.shape, checkpoint.block)
    if scale.shape != expected:
        raise ValueError(
            f"{scale.path}: {name!r} has shape {list(scale.shape)}; blocks of "
            f"{checkpoint.block[0]} x {checkpoint.block[1]} of {list(stored.shape)} make it "
            f"{list(expected)}"
        )
    return {name}


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
