"""Which expert sits in which physical slot, and which replica a token goes to.

An expert may occupy several slots (redundant experts); the shared expert may be given slots of its
own and is then dispatched to like a routed one. Source: CloudMatrix384 paper, section 4.2. Tables
come from `ep_table`, or from a plan that `cmjax place --json` wrote.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from cmjax.models.moe.config import MoEConfig
from cmjax.placement import Plan


@dataclasses.dataclass(frozen=True)
class SlotTable:
    """The physical slots of one MoE layer.

        >>> table = SlotTable((0, 1, 2, 0), ranks=2, routed_experts=3)
        >>> table.slots_per_rank, table.slots_of_expert
        (2, ((0, 3), (1,), (2,)))

    Attributes:
      experts_of_slot: expert in each slot; slots are numbered over all ranks, rank-major. Routed
        experts are `0 .. routed_experts - 1`; number `routed_experts` is the shared expert.
      ranks: number of ranks; every rank holds equally many slots.
      routed_experts: number of routed experts; each occupies at least one slot.
    """

    experts_of_slot: tuple[int, ...]
    ranks: int
    routed_experts: int

    def __post_init__(self):
        object.__setattr__(self, "experts_of_slot", tuple(int(e) for e in self.experts_of_slot))
        slots = len(self.experts_of_slot)
        if self.ranks < 1 or slots % self.ranks:
            raise ValueError(
                f"SlotTable: slots must divide evenly over ranks, got {slots} slots and "
                f"{self.ranks} ranks"
            )
        held = set(self.experts_of_slot)
        missing = sorted(set(range(self.routed_experts)) - held)
        if missing:
            raise ValueError(f"SlotTable: experts without a slot: {_shortened(missing)}")
        unknown = sorted(held - set(range(self.routed_experts + 1)))
        if unknown:
            raise ValueError(
                f"SlotTable: slots name unknown experts {_shortened(unknown)}; routed experts are "
                f"0..{self.routed_experts - 1}, the shared expert is {self.routed_experts}"
            )

    @property
    def slots(self) -> int:
        """Slots over all ranks."""
        return len(self.experts_of_slot)

    @property
    def slots_per_rank(self) -> int:
        """Slots on each rank."""
        return self.slots // self.ranks

    @property
    def has_shared(self) -> bool:
        """Whether the shared expert lives in slots (else every rank computes it locally)."""
        return self.routed_experts in self.experts_of_slot

    @functools.cached_property
    def slots_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """Slots of each routed expert, then of the shared one if it has any."""
        of: list[list[int]] = [[] for _ in range(self.routed_experts + self.has_shared)]
        for slot, expert in enumerate(self.experts_of_slot):
            of[expert].append(slot)
        return tuple(map(tuple, of))

    @property
    def max_copies(self) -> int:
        """Slots of the most replicated expert."""
        return max(map(len, self.slots_of_expert))

    def arrays(self, max_copies: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`(slots [experts, max_copies] int32, copies [experts] int32)` for `choose_slots`.

        Rows are padded by repeating; pass `max_copies` to stack the tables of several layers.
        """
        width = max_copies or self.max_copies
        slots = np.array([np.resize(row, width) for row in self.slots_of_expert], np.int32)
        copies = np.array([len(row) for row in self.slots_of_expert], np.int32)
        return slots, copies


def choose_slots(
    chosen: Int32[Array, "tokens k"],
    rank: Int32[Array, ""] | int,
    slots_of_expert: Int32[Array, "experts copies"],
    copies: Int32[Array, "experts"],
) -> Int32[Array, "tokens k"]:
    """Physical slot of each choice: replica `(source rank + token position) mod copies`.

        >>> slots, copies = map(jnp.asarray, SlotTable((0, 1, 2, 0), 2, 3).arrays())
        >>> choose_slots(jnp.array([[0, 1], [0, 2]], jnp.int32), 0, slots, copies).tolist()
        [[0, 1], [3, 2]]

    Args:
      chosen: experts of each token, the shared one (number `routed_experts`) included if it has
        slots.
      rank: the one that the tokens are on.
      slots_of_expert, copies: of `SlotTable.arrays`.
    """
    token = jnp.arange(chosen.shape[0], dtype=jnp.int32)[:, None]
    replica = (token + rank) % copies[chosen]
    return slots_of_expert[chosen, replica]


def ep_table(
    routed_experts: int, ranks: int, redundant: int = 0, shared_replicas: int = 0
) -> SlotTable:
    """Expert parallelism over `ranks`: shared replicas, routed experts, then redundant copies.

    Redundant slots copy experts 0, 1, 2, ... in turn; a placement optimiser knows better ones.

        >>> ep_table(256, 320, redundant=32, shared_replicas=32).slots_per_rank    # EP320: decode
        1
        >>> ep_table(256, 32, redundant=32).slots_per_rank          # EP32: prefill, shared local
        9

    Raises:
      ValueError: the slots do not divide evenly over the ranks.
    """
    for name, value, least in (
        ("routed_experts", routed_experts, 1),
        ("ranks", ranks, 1),
        ("redundant", redundant, 0),
        ("shared_replicas", shared_replicas, 0),
    ):
        if value < least:
            raise ValueError(f"ep_table: {name} must be at least {least}, got {value}")
    slots = routed_experts + redundant + shared_replicas
    if slots % ranks:
        raise ValueError(
            f"ep_table: {routed_experts} experts + {redundant} redundant + {shared_replicas} "
            f"shared replicas = {slots} slots do not divide over {ranks} ranks; "
            f"{-slots % ranks} more redundant slots would"
        )
    routed = [*range(routed_experts), *(i % routed_experts for i in range(redundant))]
    if not shared_replicas:
        # Redundant copies are dealt one per rank at the end of each rank's slots.
        base, extra = routed_experts // ranks, redundant // ranks
        if routed_experts % ranks == 0 and redundant % ranks == 0:
            routed = [
                expert
                for rank in range(ranks)
                for expert in (
                    *range(rank * base, (rank + 1) * base),
                    # of a neighbour's experts, so that a copy relieves another rank
                    *(((rank + 1) * base + i) % routed_experts for i in range(extra)),
                )
            ]
    return SlotTable((*(routed_experts,) * shared_replicas, *routed), ranks, routed_experts)


def published_table(
    config: MoEConfig, ranks: int, *, phase: Literal["prefill", "decode"] = "decode"
) -> SlotTable:
    """Slots of the published deployments, generalised to any number of ranks and experts.

    More ranks than experts: one slot a rank; up to 32 of the spare ones hold the shared expert, the
    rest redundant routed ones (EP320: 256 + 32 + 32, EP288: 256 + 32). Otherwise every rank has a
    local shared expert, and as many redundant slots as fill the last rank; prefill has one more
    redundant slot per rank (EP32: 8 + 1). Source: CloudMatrix384 paper, sections 4.2 and 4.3.

        >>> from cmjax.models.moe.presets import deepseek_r1
        >>> decode = published_table(deepseek_r1(), 320)
        >>> decode.slots_per_rank, decode.has_shared
        (1, True)
        >>> prefill = published_table(deepseek_r1(), 32, phase="prefill")
        >>> prefill.slots_per_rank, prefill.has_shared
        (9, False)

    Args:
      config: the model.
      ranks: of the expert-parallel group.
      phase: which half of a disaggregated system.
    """
    spare = ranks - config.routed_experts
    if spare > 0 and config.shared_experts == 1:
        shared = min(32, spare)
        return ep_table(config.routed_experts, ranks, spare - shared, shared)
    redundant = -config.routed_experts % ranks
    if phase == "prefill" and not redundant:
        redundant = ranks
    return ep_table(config.routed_experts, ranks, redundant)


def one_rank_table(routed_experts: int) -> SlotTable:
    """All experts on one rank, in order, as a checkpoint has them."""
    return SlotTable(tuple(range(routed_experts)), 1, routed_experts)


def plan_tables(plan: Plan, config: MoEConfig, ranks: int, *, mtp: bool = False) -> list[SlotTable]:
    """The slot table of every MoE layer from a plan; the MTP layer's is the last layer's unless the
    plan has one for it.

    A plan with one expert more than the model has routed ones (`cmjax place --shared 1`) gives the
    shared expert slots.

    Args:
      plan: of `cmjax.placement.read_plan`.
      config: the model.
      ranks: of the mesh.
      mtp: whether the MTP layer needs a table.
    Raises:
      ValueError: the plan is for another model or mesh; names the sizes. Or it has empty slots or
        shares per slot.
    """
    layers = config.moe_layers
    in_slots = plan.experts - config.routed_experts == 1 == config.shared_experts
    wrong = [
        f"{name}: plan {planned}, {what} {wanted}"
        for name, planned, what, wanted in (
            ("experts per layer", plan.experts - in_slots, "model", config.routed_experts),
            ("ranks", plan.ranks, "mesh", ranks),
        )
        if planned != wanted
    ]
    if plan.layers not in (layers, layers + (config.mtp_layers > 0)):
        wrong.append(f"MoE layers: plan {plan.layers}, model {layers}")
    if wrong:
        raise ValueError(f"{plan.source}: a plan for another deployment ({'; '.join(wrong)})")
    if plan.split is not None or (plan.filled < plan.slots_per_rank).any():
        raise ValueError(
            f"{plan.source}: expected every slot filled and an even split over copies; this plan "
            "has empty slots or shares per slot"
        )
    rows = [tuple(row) for row in plan.expert_of_slot.tolist()]
    if mtp and len(rows) == layers:
        rows.append(rows[-1])
    return [SlotTable(row, ranks, config.routed_experts) for row in rows[: layers + mtp]]


def stack_tables(
    tables: Sequence[SlotTable], max_copies: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`SlotTable.arrays` of several layers, stacked on a leading axis."""
    width = max_copies or max(table.max_copies for table in tables)
    slots, copies = zip(*(table.arrays(width) for table in tables), strict=True)
    return np.stack(slots), np.stack(copies)


def _shortened(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f", ... ({len(numbers)} in all)" if len(numbers) > 8 else "")
