"""What a generation needs of this machine's memory, found before anything is made.

Several processes are taken to have a machine each, the smallest of which decides for all.
"""

import math
import os
from pathlib import Path

import jax

from cmjax.mesh import RANKED, RankMesh
from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import param_specs
from cmjax.models.moe.steps import abstract_params
from cmjax.processes import of_every_process

_SMALLER = ("bfloat16", "int8")  # than float32, in order
_EXCHANGE_FRACTION = 0.25
"""Of the memory, what exchange buffers may take; the rest is parameters, caches and the system."""


def check_memory(
    config: MoEConfig,
    parallelism: Parallelism,
    mesh: RankMesh,
    precision: Arithmetic | str,
    mtp: bool,
) -> None:
    """Refuse parameters that cannot fit this machine before making any.

    Raises: ValueError: names the bytes needed and there, and an arithmetic that would fit.
    """
    if jax.default_backend() != "cpu":
        return
    needed, *fewer = (
        parameter_bytes(config, parallelism, mesh, name, mtp) // jax.process_count()
        for name in (precision, *_SMALLER)
    )
    there = _machine_bytes()
    if needed <= there:
        return
    smaller = dict(zip(_SMALLER, fewer, strict=True))
    fit = [f"{name} takes {size / 1e9:,.1f} GB" for name, size in smaller.items() if size <= there]
    raise ValueError(
        f"the parameters take {needed / 1e9:,.1f} GB on "
        f"{mesh.ranks // jax.process_count()} ranks in {precision}, "
        f"this machine has {there / 1e9:,.1f} GB, {(needed - there) / 1e9:,.1f} GB too few; "
        + (" and ".join(fit) or "choose a smaller model, mesh or precision")
    )


def parameter_bytes(
    config: MoEConfig,
    parallelism: Parallelism,
    mesh: RankMesh,
    precision: Arithmetic | str,
    mtp: bool,
) -> int:
    """Bytes of the parameters on all ranks of a mesh."""
    shapes = abstract_params(config, parallelism, precision, mtp=mtp)
    specs = param_specs(shapes, parallelism)
    needed = 0
    for spec, leaf in zip(jax.tree.leaves(specs), jax.tree.leaves(shapes), strict=True):
        copies = parallelism.ranks if spec is RANKED else mesh.nodes
        needed += copies * math.prod(leaf.shape) * leaf.dtype.itemsize
    return needed


def exchange_bytes(config: MoEConfig, parallelism: Parallelism, tokens: int) -> int:
    """About the most that the buffers of one MoE block take on all ranks, `tokens` on each.

    Dispatch reserves a row per token for every (source rank, slot), so they grow with the square of
    the ranks; rows that are sorted instead, on one device, are as many as there are copies of
    tokens. Of a row, sent and received copies, both halves of the SwiGLU and its product live at
    once, in float32.
    """
    table = parallelism.table
    each = config.experts_per_token + table.has_shared if parallelism.sorts_rows else table.slots
    rows = parallelism.ranks * each * tokens
    return 4 * rows * (2 * config.hidden_size + 3 * config.expert_ffn_size)


def chunk_that_fits(
    config: MoEConfig, parallelism: Parallelism, requests: int, prompt: int
) -> int | None:
    """`None` if whole prompts can be dispatched at once, else how many tokens of each (a power of
    two).

    Args:
      requests, prompt: of a rank, and tokens of each.
    Raises:
      ValueError: one token of each is too much; names the bytes needed and there.
    """
    room = _EXCHANGE_FRACTION * _machine_bytes()
    each = exchange_bytes(config, parallelism, requests) // jax.process_count()
    if jax.default_backend() != "cpu" or each * prompt <= room:
        return None
    if each > room:
        raise ValueError(
            f"dispatching one token of {requests} request(s) on each of {parallelism.ranks} ranks "
            f"takes {each / 1e9:,.1f} GB, {room / 1e9:,.1f} GB are to be had here; give fewer "
            "prompts, or choose a smaller model or mesh"
        )
    return 2 ** int(math.log2(room // each))


_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _machine_bytes() -> int:
    """Memory of this machine, or less where a container is limited to that."""
    there = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else "max"
        there += [int(text)] if text.isdecimal() else []
    return min(of_every_process(min(there)))
