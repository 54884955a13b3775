"""The placement problem: loads, and the machine's side of the bargain.

A layer has `experts` routed experts and `copies = experts + redundant` places to fill, the same
number on every rank, or one less on some (`uneven`: a slot of those stays empty). Dead ranks and
layers with fewer slots make some slots unusable; `dense` splits such a problem into ones without
exceptions, which is all that a method has to solve.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from cmjax.placement.loads import Loads
from cmjax.placement.plan import EMPTY, Plan, count_copies
from cmjax.placement.rank_cost import rank_cost
from cmjax.placement.risk import MEAN, Risk
from cmjax.placement.routing import Routing

__all__ = ["Plan", "Problem", "count_copies"]


@dataclass(frozen=True, eq=False)
class Problem:
    """Loads to place, and where.

    Attributes:
      loads: tokens per window, layer and expert. Windows may be stretches of time or workloads; the
        search treats all as equally long, so scale them to one step (`Loads.scaled`).
      ranks: expert-parallel ranks (dies, or NPUs where one process drives both dies).
      redundant: extra slots per layer, over all ranks together.
      nodes: nodes the ranks are spread over, in order and evenly.
      groups: the router's expert groups (`n_group` of the model). Only when they divide over the
        nodes does the greedy method keep each group inside one node.
      objective: what counts of the time of all layers, over the windows.
      without_ranks: ranks that hold nothing, such as dead ones.
      slots_by_layer: slots of a rank that each layer may use (default: all of them).
      routing: how tokens choose among the copies of their expert, which every plan of the problem
        is judged by (`cmjax.placement.routing`).
      uneven: experts + redundant need not divide over the ranks; some hold one expert less.
      rank_cost: what a token costs on each rank, over an ordinary one; None is 1 everywhere.
    Raises: ValueError if ranks, nodes, slots or groups do not divide (it says what would), the
      usable slots are fewer than the experts, or for an unknown routing.

    >>> problem = Problem(Loads([[60, 10, 20]]), ranks=2, redundant=1)
    >>> problem.slots, problem.slots_per_rank
    (4, 2)
    >>> problem.plan([[0, 1, 2, 0]])
    Plan(1 layers of 3 experts, 4 slots on 2 ranks)
    """

    loads: Loads
    ranks: int
    redundant: int = 0
    nodes: int = 1
    groups: int = 1
    objective: Risk = MEAN
    without_ranks: tuple[int, ...] = ()
    slots_by_layer: tuple[int, ...] | None = None
    routing: str = "even"
    uneven: bool = False
    rank_cost: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("ranks", "nodes", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"Problem: {name} must be at least 1, got {getattr(self, name)}")
        if self.redundant < 0:
            raise ValueError(f"Problem: redundant must be 0 or more, got {self.redundant}")
        if self.ranks % self.nodes:
            raise ValueError(
                f"Problem: {self.ranks} ranks do not divide over {self.nodes} nodes; "
                f"ranks must be a multiple of nodes"
            )
        if self.experts % self.groups:
            raise ValueError(
                f"Problem: {self.experts} experts do not divide into {self.groups} groups"
            )
        over = self.copies % self.ranks
        if over and not self.uneven:
            fits = [self.redundant - over, self.redundant + self.ranks - over]
            fits = " or ".join(str(fit) for fit in fits if fit >= 0)
            raise ValueError(
                f"Problem: {self.experts} experts + {self.redundant} redundant slots do not divide "
                f"over {self.ranks} ranks; the nearest redundant that does is {fits}"
            )
        if self.uneven and (self.without_ranks or self.slots_by_layer is not None):
            raise ValueError("Problem: uneven goes with neither without_ranks nor slots_by_layer")
        Routing(self.routing)
        if self.rank_cost is not None:
            object.__setattr__(self, "rank_cost", rank_cost(self.rank_cost, self.ranks))
        self._check_usable()
        alive = self.alive // (self.ranks // self.nodes)
        if self.routing == "nearest-copy" and len(set(np.bincount(alive).tolist()) - {0}) > 1:
            raise ValueError(
                "Problem: routing nearest-copy needs equally many ranks alive on every node"
            )

    @property
    def layers(self) -> int:
        return self.loads.counts.shape[1]

    @property
    def experts(self) -> int:
        return self.loads.counts.shape[2]

    @property
    def copies(self) -> int:
        """Places that may hold an expert."""
        return self.experts + self.redundant

    @property
    def slots_per_rank(self) -> int:
        return -(-self.copies // self.ranks)

    @property
    def slots(self) -> int:
        """Slots of a layer: `copies`, and those that stay empty where ranks are uneven."""
        return self.slots_per_rank * self.ranks

    @property
    def most_copies(self) -> int:
        """Copies that an expert gets at most: one a rank, as a second one there is of no use.

        More only where a rank has more slots than there are experts.
        """
        return max(self.ranks, -(-self.copies // self.experts))

    @property
    def route(self) -> Routing:
        """The rule that gives copies their shares."""
        return Routing(self.routing, self.nodes)

    @property
    def alive(self) -> Int[np.ndarray, "alive"]:
        """Ranks that may hold experts, in order."""
        return np.setdiff1d(np.arange(self.ranks), self.without_ranks)

    @property
    def alive_cost(self) -> tuple[float, ...] | None:
        """What a token costs on each of them."""
        return None if self.rank_cost is None else tuple(self.rank_cost[r] for r in self.alive)

    @property
    def usable(self) -> Int[np.ndarray, "layers"]:
        """Slots of every rank that each layer may use."""
        if self.slots_by_layer is None:
            return np.full(self.layers, self.slots_per_rank)
        return np.asarray(self.slots_by_layer)

    @property
    def is_dense(self) -> bool:
        """Whether every slot of every rank may be used."""
        return not self.without_ranks and bool((self.usable == self.slots_per_rank).all())

    def dense(self) -> list[tuple[Int[np.ndarray, "rows"], "Problem"]]:
        """Problems in which all slots are usable, and the layers that each is for.

        Dead ranks are left out, so the rest spread over nodes only if they still do so evenly;
        otherwise they count as one node.
        """
        if self.is_dense:
            return [(np.arange(self.layers), self)]
        alive = self.alive
        by_node = np.bincount(alive // (self.ranks // self.nodes), minlength=self.nodes)
        by_node = by_node[by_node > 0]
        nodes = len(by_node) if len(set(by_node.tolist())) == 1 else 1
        parts = []
        for size in np.unique(self.usable):
            rows = np.flatnonzero(self.usable == size)
            parts.append((rows, replace(
                self, loads=self.loads_of(rows), ranks=len(alive), nodes=nodes,
                redundant=int(size) * len(alive) - self.experts,
                without_ranks=(), slots_by_layer=None, rank_cost=self.alive_cost,
            )))  # fmt: skip
        return parts

    def assemble(self, parts: Sequence[Plan]) -> Plan:
        """The plan of this problem from those of its `dense` ones, in order."""
        if self.is_dense:
            return replace(parts[0], layer_labels=self.loads.layer_labels)
        experts = np.full((self.layers, self.ranks, self.slots_per_rank), EMPTY, np.int32)
        split = np.zeros(experts.shape)
        for (rows, _), plan in zip(self.dense(), parts, strict=True):
            spot = np.ix_(rows, self.alive, np.arange(plan.slots_per_rank))
            shape = (len(rows), len(self.alive), -1)
            experts[spot] = plan.expert_of_slot.reshape(shape)
            split[spot] = plan.split_of_slot.reshape(shape)
        uneven = any(plan.split is not None for plan in parts)
        return self.plan(
            experts.reshape(self.layers, -1), split.reshape(self.layers, -1) if uneven else None
        )

    def loads_of(self, rows: Int[np.ndarray, "rows"]) -> Loads:
        """The loads of some layers."""
        labels = self.loads.layer_labels
        named = None if labels is None else tuple(labels[row] for row in rows)
        return replace(self.loads, counts=self.loads.counts[:, rows], layer_labels=named)

    def plan(self, expert_of_slot: Int[np.ndarray, "layers slots"], split=None) -> Plan:
        """A plan for this problem from the expert of every slot; validates it."""
        expected = (self.layers, self.slots)
        if np.shape(expert_of_slot) != expected:
            raise ValueError(
                f"Problem.plan: expected slots of shape {expected} (layers, slots), "
                f"got {np.shape(expert_of_slot)}"
            )
        return Plan(
            np.asarray(expert_of_slot), self.experts, self.ranks, self.nodes,
            self.loads.layer_labels, split, routing=self.routing, rank_cost=self.rank_cost,
        )  # fmt: skip

    def _check_usable(self):
        wrong = [rank for rank in self.without_ranks if not 0 <= rank < self.ranks]
        if wrong:
            raise ValueError(
                f"Problem: without_ranks must name ranks 0 to {self.ranks - 1}, got {wrong[0]}"
            )
        usable = self.usable
        if usable.shape != (self.layers,) or usable.max() > self.slots_per_rank:
            raise ValueError(
                f"Problem: slots_by_layer must be {self.layers} numbers of at most "
                f"{self.slots_per_rank} slots per rank, got {self.slots_by_layer}"
            )
        alive = len(self.alive)
        if usable.min() * alive < self.experts:
            need = -(-self.experts // max(alive, 1)) * self.ranks - self.experts
            raise ValueError(
                f"Problem: {alive} of {self.ranks} ranks with {usable.min()} slots hold "
                f"{usable.min() * alive} experts, fewer than {self.experts}; "
                f"redundant of at least {need} is needed"
            )
