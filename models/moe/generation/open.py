"""From a checkpoint folder, or a config and random numbers, to a generator on a mesh of ranks.

    generator = open_generator("path/of/a/checkpoint", RankMesh(2, 4))
    found = generator.generate([[1, 2, 3]], new_tokens=16)

Everything that can be wrong is found before a weight is read or made: experts without a slot,
widths that a format does not divide, more bytes than this machine has.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cmjax.console import Progress
from cmjax.inputs import check_count
from cmjax.mesh import RankMesh
from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.checkpoint.load import Checkpoint, load_params, open_checkpoint
from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.generation.generator import Generator
from cmjax.models.moe.generation.memory import check_memory, chunk_that_fits
from cmjax.models.moe.generation.packed import identity_of, packed_params
from cmjax.models.moe.generation.placed import padded_length
from cmjax.models.moe.generation.programs import (
    check_prefill,
    place_params,
    placed_shapes,
)
from cmjax.models.moe.huge_pages import use_huge_pages
from cmjax.models.moe.layered import split_layers
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import layer_tables, shard_params
from cmjax.models.moe.slots import SlotTable, plan_tables, published_table
from cmjax.models.moe.steps import abstract_params, init_params
from cmjax.placement import read_plan

_MOST_DRAFTS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """What a generator computes in, and how it is spread over its ranks."""

    arithmetic: str = "float32"
    """What the model computes in: float32, bfloat16, int8 (W8A8), msd_w8a16, msd_w4a16 (MXFP4),
    both with _head8 (the output matrix in 8 bits too), msd_w4a16_kv4, pasa_fp16, int8_pasa_fp16."""
    kv_cache: KVCache | None = None
    """Format of the cache (default: the arithmetic's)."""
    plan: Path | None = None
    """Where experts live: a plan written by `cmjax place --json` (default: as in the published
    deployments)."""
    prefill: Literal["auto", "data-parallel", "sequence-parallel"] = "auto"
    """How prompts are run: each by its rank, or all by all ranks, a part of the heads each (auto:
    where latent attention's heads divide over the ranks)."""
    prefill_chunk: int | None = None
    """Run prompts this many tokens at a time (default: whole, or in chunks where dispatching whole
    prompts would not fit this machine's memory)."""
    packed: Path | None = None
    """Keep the weights in this file as the arithmetic has them, of the size that they have in
    memory: the first start writes it, later ones map it, at once and sharing its pages."""
    drafts: int | None = None
    """Tokens drafted per step by multi-token prediction (default: 1 if the model can)."""


def open_generator(
    source: str | Path | Checkpoint | MoEConfig,
    mesh: RankMesh | None = None,
    options: GeneratorOptions | None = None,
    *,
    requests: int = 1,
    prompt_tokens: int | None = None,
    seed: int = 0,
    split: bool | None = None,
    progress: Progress | None = None,
) -> Generator:
    """A model on its mesh, ready to generate.

        >>> from cmjax.models.moe import open_generator, tiny
        >>> generator = open_generator(tiny())  # random parameters on one rank
        >>> generator.mesh, generator.drafts
        (RankMesh(nodes=1, npus=1, dies=1, tensor=1), 1)

    Args:
      source: a checkpoint folder, what `open_checkpoint` gave, or a config: random parameters.
      mesh: the ranks; by default one. Its devices must be there (`cmjax.mesh.prepare_devices`).
      options: arithmetic, placement of the experts, and parallelism; by default float32 and the
        slots of the published deployments.
      requests, prompt_tokens: how many prompts there will be and how long the longest is, which
        decides whether prefill runs in chunks; by default as long as the model is meant for.
      seed: of random parameters.
      split: keep the arrays of layers apart (`cmjax.models.moe.layered`): faster steps,
        longer compilation; by default where all ranks are on one device.
      progress: called with the bytes read so far, in all, and what is being done.
    Raises:
      ValueError: a folder that is no checkpoint of a known family; a plan of another model or mesh;
        drafts without the weights to draft; an arithmetic that does not fit the model's widths;
        parameters or exchange buffers that this machine has no memory for; a `packed` file that is
        none, or of random parameters.
    """
    mesh, options = mesh or RankMesh(1, 1), options or GeneratorOptions()
    model = open_checkpoint(source) if isinstance(source, str | Path) else source
    config = model.config if isinstance(model, Checkpoint) else model
    if options.packed is not None and not isinstance(model, Checkpoint):
        raise ValueError(
            f"packed {options.packed}: a file keeps the weights of a checkpoint folder; random "
            "parameters are made, not kept"
        )
    drafts = _drafts(model, options.drafts)
    mtp = drafts > 0
    parallelism, tables = _placed_experts(config, mesh, options.plan, mtp)
    arithmetic = Arithmetic.of(options.arithmetic)
    if options.kv_cache is not None:
        arithmetic = dataclasses.replace(arithmetic, kv_cache=options.kv_cache)
    arithmetic.check(config)
    check_memory(config, parallelism, mesh, arithmetic, mtp)
    longest = config.context_limit if prompt_tokens is None else prompt_tokens
    chunk, sequence_parallel = _prefill(config, parallelism, mesh, options, requests, longest)
    split = mesh.nodes == 1 if split is None else split
    if isinstance(model, Checkpoint):
        params, mapped = _read_params(
            model,
            parallelism,
            mesh,
            tables,
            arithmetic,
            mtp=mtp,
            split=split,
            packed=options.packed,
            progress=progress,
        )
    else:
        one = init_params(config, arithmetic, mtp=mtp, seed=seed)
        params = place_params(shard_params(one, parallelism, tables), parallelism, mesh)
        params, mapped = (split_layers(params, parallelism) if split else params), False
    if split and not mapped:  # layers that are scanned are copied before they are read
        use_huge_pages(params)
    return Generator(
        config=config,
        params=params,
        parallelism=parallelism,
        mesh=mesh,
        precision=arithmetic,
        kv_cache=arithmetic.kv_cache,
        drafts=drafts,
        prefill_chunk=chunk,
        sequence_parallel=sequence_parallel,
    )


def _read_params(
    checkpoint: Checkpoint,
    parallelism: Parallelism,
    mesh: RankMesh,
    tables: Sequence[SlotTable] | None,
    arithmetic: Arithmetic,
    *,
    mtp: bool,
    split: bool,
    packed: Path | None,
    progress: Progress | None,
) -> tuple[Any, bool]:
    """The parameters of a checkpoint, and whether they are mapped from a file that keeps them."""
    load = functools.partial(
        load_params,
        checkpoint,
        parallelism,
        precision=arithmetic,
        mtp=mtp,
        mesh=mesh,
        tables=tables,
        split=split,
        progress=progress,
    )
    if packed is None:
        return load(), False
    whole = abstract_params(checkpoint.config, parallelism, arithmetic, mtp=mtp)
    shapes = placed_shapes(whole, parallelism, mesh, split=split)
    each = layer_tables(parallelism, checkpoint.config.moe_layers + mtp, tables)
    return packed_params(
        packed, shapes, identity_of(checkpoint, arithmetic, each, shapes), load, progress
    )


def _drafts(model: Checkpoint | MoEConfig, wanted: int | None) -> int:
    """Drafts per step: the wanted number, or one where the model can."""
    possible = model.has_mtp if isinstance(model, Checkpoint) else model.mtp_layers > 0
    drafts = int(possible) if wanted is None else wanted
    check_count("drafts", drafts, least=0, most=_MOST_DRAFTS)
    if drafts and not possible:
        raise ValueError(
            f"drafts {drafts}: this model has no multi-token-prediction module to draft with; use 0"
        )
    return drafts


def _placed_experts(
    config: MoEConfig, mesh: RankMesh, plan: Path | None, mtp: bool
) -> tuple[Parallelism, Sequence[SlotTable] | None]:
    """Slots of the experts on the ranks, and the table of each layer where they differ."""
    parallelism = functools.partial(Parallelism, axes=mesh.axes, sort_rows=mesh.nodes == 1)
    if plan is None:
        return parallelism(table=published_table(config, mesh.ranks)), None
    tables = plan_tables(read_plan(plan), config, mesh.ranks, mtp=mtp)
    return parallelism(table=max(tables, key=lambda table: table.max_copies)), tables


def _prefill(
    config: MoEConfig,
    parallelism: Parallelism,
    mesh: RankMesh,
    options: GeneratorOptions,
    requests: int,
    prompt_tokens: int,
) -> tuple[int | None, bool]:
    """Tokens of a chunk of the prompts, `None` for whole ones, and whether prefill is
    sequence-parallel: as asked for, else what fits into memory and what the heads allow."""
    chunk = options.prefill_chunk
    if chunk is None:
        each, padded = -(-requests // mesh.ranks), padded_length(config, prompt_tokens)
        chunk = chunk_that_fits(config, parallelism, each, padded)
    sequence_parallel = options.prefill == "sequence-parallel"
    if options.prefill == "auto":
        splits = isinstance(config.attention, LatentAttention) and config.heads % mesh.ranks == 0
        sequence_parallel = mesh.ranks > 1 and splits and chunk is None
    check_prefill(config, parallelism, chunk, sequence_parallel)
    return chunk, sequence_parallel
