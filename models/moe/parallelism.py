"""How a model is spread over the ranks of a mesh, as the program of one rank sees it."""

import dataclasses
from typing import Any

import jax
from jax import lax

from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.schedule import Schedule
from cmjax.models.moe.slots import SlotTable, one_rank_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Data, expert and sequence parallelism: all that a module needs to know of them. Static."""

    table: SlotTable
    """Slots of the experts (of every layer: tables may differ in content, not in size)."""
    axes: tuple[str, ...] = ()
    """Mesh axes that enumerate the ranks; `()` on one rank."""
    capacity: Any = None
    """Rows reserved per (source rank, slot) in dispatch; `None` never drops."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """Issue order and streams."""
    sequence_parallel: bool = False
    """Prefill attention SP -> TP -> SP: latents are gathered, each rank attends a part of the
    heads for all sequences, and heads are exchanged back for the rank's own sequences."""
    sort_rows: bool = False
    """One rank without a capacity, for inference: copies of tokens are sorted by expert, instead of
    laid out in a block of static size for each."""

    def __post_init__(self):
        if not self.axes and self.table.ranks != 1:
            raise ValueError(
                f"Parallelism: a table of {self.table.ranks} ranks needs the mesh axes that "
                "enumerate them, got axes=()"
            )

    @property
    def sorts_rows(self) -> bool:
        """Whether `sort_rows` applies."""
        return self.sort_rows and self.ranks == 1 and self.capacity is None

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.table.ranks

    @property
    def rank(self) -> jax.Array | int:
        """This rank's number, inside the mesh."""
        return lax.axis_index(self.axes) if self.axes else 0

    def heads(self, config: MoEConfig) -> int:
        """Attention heads whose up-projections this rank holds."""
        if not self.sequence_parallel:
            return config.heads
        if not isinstance(config.attention, LatentAttention):
            raise ValueError(
                "Parallelism: sequence_parallel splits the heads of latent attention only; this "
                "model has grouped-query attention, use sequence_parallel=False"
            )
        if config.heads % self.ranks:
            raise ValueError(
                f"Parallelism: sequence_parallel needs heads to divide over the ranks, got "
                f"{config.heads} heads and {self.ranks} ranks"
            )
        return config.heads // self.ranks


def one_rank(config: MoEConfig, schedule: Schedule | None = None) -> Parallelism:
    """None: every expert on one rank, as a checkpoint has them, and no communication.

    >>> from cmjax.models.moe.config import tiny
    >>> one_rank(tiny()).ranks
    1
    """
    return Parallelism(table=one_rank_table(config.routed_experts), schedule=schedule or Schedule())
