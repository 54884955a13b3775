"""Hugging Face checkpoints (config.json and safetensors) as models.

    model = load("path/of/a/checkpoint")       # an NNX module on one device

Loading checks every name, type and shape from the files' headers before it reads a value. Then it
goes tensor by tensor straight to where the values live: a parameter's buffer is made on its device
once, each tensor is written into it in place, and at most one tensor at a time is in host memory.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmjax.console import Progress
from cmjax.inputs import listed as shortened
from cmjax.mesh import RankMesh
from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.checkpoint.buffers import ParameterBuffers
from cmjax.models.moe.checkpoint.folder import list_folder
from cmjax.models.moe.checkpoint.fused_experts import unfused
from cmjax.models.moe.checkpoint.generation_config import (
    GenerationDefaults,
    read_generation_config,
)
from cmjax.models.moe.checkpoint.hf_config import parse_config, read_json
from cmjax.models.moe.checkpoint.safetensor_file import StoredTensor
from cmjax.models.moe.checkpoint.tensor_names import (
    WeightMapping,
    is_known,
    mtp_marker,
    weight_mappings,
)
from cmjax.models.moe.checkpoint.weight_scales import WeightScales, is_scale, read_scales
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.model import MoEModel, abstract_model, assemble
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.sharding import layer_tables
from cmjax.models.moe.slots import SlotTable

_MANY = 100_000
"""Missing tensors after which nobody counts on."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder's config and the places of its tensors; no values."""

    folder: Path
    config: MoEConfig
    """Of its config.json; `end_tokens` of its generation_config.json, where that names some."""
    tensors: dict[str, StoredTensor]
    scales: WeightScales
    """Which of them are few-bit values times scales."""
    defaults: GenerationDefaults
    """How its text is drawn where the caller says nothing."""

    @property
    def has_mtp(self) -> bool:
        """Whether it holds the weights of a multi-token-prediction module."""
        return self.config.mtp_layers > 0 and mtp_marker(self.config) in self.tensors


def load(
    path: str | Path,
    *,
    precision: Arithmetic | str = "float32",
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

    Reads DeepSeek-V2, DeepSeek-V3 (R1, Kimi-K2), GLM-4.5, Qwen3-MoE and Mixtral, of dense models
    Qwen3 and Llama; F32, F16, BF16, FP8 (E4M3, per block or tensor) and the 8-bit weights of
    compressed-tensors; experts one by one or fused.

    Args:
      path: folder with config.json and model.safetensors, or shards and their index.
      precision: what the model computes in, an arithmetic or its name; weights are rounded to its
        formats as they are read.
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
    """Read a folder's config.json, generation_config.json, index and headers.

    Raises: ValueError: see `load`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a checkpoint is one with a config.json")
    raw, file = read_json(folder)
    config = parse_config(raw, file)
    defaults = read_generation_config(folder)
    if defaults.end_tokens is not None:
        config = dataclasses.replace(config, end_tokens=defaults.end_tokens)
    scales = read_scales(raw.get("quantization_config"), file)
    return Checkpoint(folder, config, unfused(list_folder(folder), config), scales, defaults)


def load_params(
    checkpoint: Checkpoint,
    parallelism: Parallelism,
    *,
    precision: Arithmetic | str = "float32",
    mtp: bool = False,
    mesh: RankMesh | None = None,
    tables: Sequence[SlotTable] | None = None,
    split: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Parameters of `parallelism`'s model, as `shard_params` would give them.

    Args:
      mesh: the ranks; each tensor goes to the devices whose ranks hold it. `None` for one rank,
        without a mesh.
      tables: one per MoE layer (then one for the MTP layer, if it is loaded); by default
        `parallelism.table` for all.
      precision: as of `load`.
      split: give every layer arrays of its own, as `cmjax.models.moe.layered.split_layers` does.
    Raises: ValueError: see `load`; or tables that do not fit `parallelism.table`.
    """
    config = checkpoint.config
    Arithmetic.of(precision).check(config)
    if parallelism.tensor > 1:
        raise ValueError(
            f"load_params: a checkpoint is not read into tensor-parallel groups (of "
            f"{parallelism.tensor}); load it on one rank and spread it with shard_params"
        )
    wanted = _wanted(checkpoint, mtp)
    _check(checkpoint, wanted)
    tables = layer_tables(parallelism, config.moe_layers + mtp, tables)
    buffers = ParameterBuffers(config, parallelism, precision, mtp, mesh, split=split)
    total = sum(checkpoint.tensors[mapping.name].nbytes for mapping in wanted)
    done = 0
    for mapping in wanted:
        stored = checkpoint.tensors[mapping.name]
        scale = checkpoint.scales.of(stored, checkpoint.tensors)
        if not buffers.holds(mapping, tables):
            pass  # another process reads it
        elif scale is None:
            buffers.place(mapping, tables, stored.read(), None, (1, 1))
        else:
            steps = scale.stored.read().reshape(scale.shape)
            buffers.place(mapping, tables, stored.read(), steps, scale.block)
        done += stored.nbytes
        if progress is not None:
            progress(done, total, "loading")
    buffers.place_tables(tables)
    return buffers.finish()


def _wanted(checkpoint: Checkpoint, mtp: bool) -> list[WeightMapping]:
    """What is to be read; all of it is there."""
    config, tensors, folder = checkpoint.config, checkpoint.tensors, checkpoint.folder
    if mtp and not checkpoint.has_mtp:
        raise ValueError(
            f"{folder}: no multi-token-prediction weights ({mtp_marker(config)!r} is absent); "
            "load with mtp=False"
        )
    wanted: list[WeightMapping] = []
    missing: list[str] = []
    for mapping in weight_mappings(config, mtp=mtp):
        wanted.append(mapping)
        if mapping.name not in tensors:
            missing.append(mapping.name)
        if len(missing) > _MANY:
            raise ValueError(
                f"{folder}: more than {_MANY:,} tensors of this {config.family} model are missing: "
                f"{', '.join(missing[:4])}, ..."
            )
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors of this {config.family} model are "
            f"missing: {shortened(missing)}"
        )
    return wanted


def _check(checkpoint: Checkpoint, wanted: list[WeightMapping]) -> None:
    """Everything wanted is as it should be, and nothing else is there."""
    config, tensors, folder = checkpoint.config, checkpoint.tensors, checkpoint.folder
    for mapping in wanted:
        stored = tensors[mapping.name]
        if stored.shape != mapping.shape:
            raise ValueError(
                f"{stored.path}: tensor {mapping.name!r} has shape {list(stored.shape)}, "
                f"config.json makes it {list(mapping.shape)}"
            )
        checkpoint.scales.of(stored, tensors)
    listed = {mapping.name for mapping in wanted}
    unknown = [
        name
        for name, stored in tensors.items()
        if stored.nbytes
        and name not in listed
        and not is_known(name, config)
        and not is_scale(name, listed)
    ]
    if unknown:
        raise ValueError(
            f"{folder}: {len(unknown)} tensors have no place in the {config.family} model that "
            f"config.json describes: {shortened(unknown)}"
        )
