"""A placement: which expert each physical slot of each rank holds, and how its tokens are split.

Slot s lives on rank s // slots_per_rank, which receives

    tokens[r] = sum over slots s of rank r of  load[expert[s]] · share[s],

where the share is 1 / copies[expert[s]] if an expert's tokens are split evenly over its copies, and
what the engine's rule makes of it otherwise (`routing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cmjax.placement.loads import check_sizes, checked_labels
from cmjax.placement.rank_cost import rank_cost, weigh
from cmjax.placement.routing import Routing

EMPTY = -1
"""What an empty slot holds."""


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The expert that each physical slot holds, with all that a file may say about it.

    Attributes:
      expert_of_slot: int32 `[layers, slots]`; slot s lives on rank s // (slots / ranks); -1 is an
        empty slot: of a dead rank, or of a layer with fewer slots than another. Read-only.
      experts: logical experts per layer.
      ranks: expert-parallel ranks.
      nodes: nodes the ranks are spread over, in order.
      layer_labels: the model's own number of each layer, where known.
      split: float64 `[layers, slots]`, the share of its expert's tokens that a slot serves, 0 in
        empty slots; None is what `routing` makes of it.
      provenance: how the plan came about, as JSON can hold it.
      source: where it was read, for messages.
      routing: how tokens choose among the copies of their expert: `even`, `nearest-copy` (SGLang)
        or `rank-modulo` (vLLM-Ascend); see `cmjax.placement.routing`.
      rank_cost: what a token costs on each rank, over an ordinary one; None is 1 everywhere
        (`cmjax.placement.rank_cost`).
    Raises: ValueError, one line that starts with `source`, if slots do not divide over the ranks, a
      slot names no expert, an expert of some layer has no slot, labels are not one per layer, the
      shares of an expert do not sum to 1, or for an unknown routing.

    >>> plan = Plan([[0, 1, 2, 0]], experts=3, ranks=2)  # rank 0: experts 0, 1; rank 1: 2, 0
    >>> plan.tokens_per_rank([[60, 10, 20]]).tolist()
    [[40.0, 50.0]]
    >>> plan.copies.tolist(), plan.slots_per_rank
    ([[2, 1, 1]], 2)
    """

    expert_of_slot: Int[np.ndarray, "layers slots"]
    experts: int
    ranks: int
    nodes: int = 1
    layer_labels: tuple[int, ...] | None = None
    split: Float[np.ndarray, "layers slots"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    source: str = "plan"
    routing: str = "even"
    rank_cost: tuple[float, ...] | None = None

    def __post_init__(self):
        experts = np.asarray(self.expert_of_slot)
        if experts.ndim != 2 or experts.dtype.kind not in "iu" or 0 in experts.shape:
            raise ValueError(
                f"{self.source}: expected whole numbers of shape [layers, slots], found "
                f"{experts.dtype} of shape {experts.shape}"
            )
        check_sizes(self.source, layers=experts.shape[0], experts=self.experts)
        if self.ranks < 1 or experts.shape[1] % self.ranks:
            raise ValueError(
                f"{self.source}: {experts.shape[1]} slots do not divide over {self.ranks} ranks"
            )
        if self.nodes < 1 or self.ranks % self.nodes:
            raise ValueError(
                f"{self.source}: {self.ranks} ranks do not divide over {self.nodes} nodes"
            )
        wrong = np.argwhere((experts < EMPTY) | (experts >= self.experts))
        if len(wrong):
            layer, slot = wrong[0]
            raise ValueError(
                f"{self.source}: expected experts 0 to {self.experts - 1} (or {EMPTY} for an "
                f"empty slot), found {experts[layer, slot]} in slot {slot} of layer {layer}"
            )
        experts = experts.astype(np.int32)
        experts.flags.writeable = False
        object.__setattr__(self, "expert_of_slot", experts)
        lost = np.argwhere(self.copies == 0)
        if len(lost):
            layer, expert = lost[0]
            raise ValueError(f"{self.source}: expert {expert} of layer {layer} has no slot")
        labels = checked_labels(self.layer_labels, len(experts), self.source)
        object.__setattr__(self, "layer_labels", labels)
        if self.split is not None:
            object.__setattr__(self, "split", self._checked_split())
        Routing(self.routing)
        if self.rank_cost is not None:
            object.__setattr__(self, "rank_cost", rank_cost(self.rank_cost, self.ranks))

    def __repr__(self) -> str:
        nodes = f" of {self.nodes} nodes" if self.nodes > 1 else ""
        return (
            f"Plan({self.layers} layers of {self.experts} experts, {self.slots} slots on "
            f"{self.ranks} ranks{nodes})"
        )

    @property
    def layers(self) -> int:
        return self.expert_of_slot.shape[0]

    @property
    def slots(self) -> int:
        return self.expert_of_slot.shape[1]

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.ranks

    @cached_property
    def copies(self) -> Int[np.ndarray, "layers experts"]:
        """How many slots hold each expert."""
        return count_copies(self.expert_of_slot + 1, self.experts + 1)[:, 1:]

    @cached_property
    def filled(self) -> Int[np.ndarray, "layers ranks"]:
        """How many slots of each rank hold an expert."""
        return (self.expert_of_slot != EMPTY).reshape(self.layers, self.ranks, -1).sum(-1)

    @property
    def alive(self) -> Bool[np.ndarray, "ranks"]:
        """Ranks that hold an expert in some layer."""
        return self.filled.any(0)

    @cached_property
    def split_of_slot(self) -> Float[np.ndarray, "layers slots"]:
        """The share of its expert's tokens that each slot serves; 0 in empty slots."""
        if self.split is not None:
            return self.split
        if self.routing != "even":
            return self._routed_split()
        copies = np.take_along_axis(self.copies, np.maximum(self.expert_of_slot, 0), axis=1)
        return np.where(self.expert_of_slot == EMPTY, 0.0, 1 / copies)

    def tokens_per_rank(
        self, counts: Float[np.ndarray, "*batch layers experts"]
    ) -> Float[np.ndarray, "*batch layers ranks"]:
        """Tokens each rank receives when tokens choose copies as the plan says; where ranks cost
        unequally, in ordinary tokens.

        Args:
          counts: tokens per layer and expert, any leading axes (windows).
        Raises: ValueError if the last two axes are not this plan's layers and experts.
        """
        if np.shape(counts)[-2:] != (self.layers, self.experts):
            raise ValueError(
                f"{self.source}: expected counts of shape [..., {self.layers}, "
                f"{self.experts}] (layers, experts), got {np.shape(counts)}"
            )
        counts = np.asarray(counts, np.float64)
        index = np.maximum(self.expert_of_slot, 0)
        index = np.broadcast_to(index, (*counts.shape[:-1], index.shape[1]))
        per_slot = np.take_along_axis(counts, index, axis=-1) * self.split_of_slot
        tokens = per_slot.reshape(*per_slot.shape[:-1], self.ranks, self.slots_per_rank).sum(-1)
        return weigh(tokens, self.rank_cost)

    def even(self) -> "Plan":
        """The same slots, every expert's tokens split evenly over its copies."""
        return replace(self, split=None, routing="even")

    def routed(self, routing: str) -> "Plan":
        """The same slots and shares, under another rule of choosing a copy.

        Raises: ValueError for an unknown rule.
        """
        return replace(self, routing=routing)

    @property
    def doubles(self) -> int:
        """Slots that hold what another slot of their rank holds too, over all layers."""
        ordered = np.sort(self.expert_of_slot.reshape(self.layers, self.ranks, -1), axis=-1)
        same = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != EMPTY)
        return int(same.sum())

    def select(self, layers: Sequence[int]) -> "Plan":
        """Some layers, by position; no rank has more slots than one of them fills.

        Where slots are dropped, those that hold an expert come first on their rank.
        """
        rows = list(layers)
        shape = (len(rows), self.ranks, -1)
        depth = int(self.filled[rows].max())
        experts = self.expert_of_slot[rows].reshape(shape)
        order = np.arange(depth)
        if depth < self.slots_per_rank:
            order = np.argsort(experts == EMPTY, axis=-1, kind="stable")[..., :depth]
        order = np.broadcast_to(order, (*experts.shape[:2], depth))

        def kept(table):
            table = table[rows].reshape(shape)
            return np.take_along_axis(table, order, axis=-1).reshape(len(rows), -1)

        labels = self.layer_labels
        return replace(
            self,
            expert_of_slot=kept(self.expert_of_slot),
            split=None if self.split is None else kept(self.split),
            layer_labels=None if labels is None else tuple(labels[row] for row in rows),
        )

    def _routed_split(self):
        """Shares by rule; of two copies on a rank the first gets all, as engines address one."""
        layer = np.arange(self.layers)[:, None]
        home = np.arange(self.slots) // self.slots_per_rank
        held = np.zeros((self.layers, self.experts + 1, self.ranks), bool)
        held[layer, self.expert_of_slot, home] = True  # -1, an empty slot, is the last row
        share = Routing(self.routing, self.nodes)(held, self.alive)
        row = self.expert_of_slot.reshape(self.layers, self.ranks, -1)
        again = np.tril(row[..., None] == row[..., None, :], -1).any(-1)
        again = again.reshape(self.expert_of_slot.shape)
        found = share[layer, self.expert_of_slot, home]
        return np.where((self.expert_of_slot == EMPTY) | again, 0.0, found)

    def _checked_split(self):
        split = np.asarray(self.split)
        if split.shape != self.expert_of_slot.shape or split.dtype.kind not in "iuf":
            raise ValueError(
                f"{self.source}: expected a share for every slot, shape "
                f"{self.expert_of_slot.shape}, found {split.dtype} of shape {split.shape}"
            )
        split = split.astype(np.float64)
        if (
            not np.isfinite(split).all()
            or split.min() < 0
            or split[self.expert_of_slot == EMPTY].any()
        ):
            raise ValueError(
                f"{self.source}: expected finite shares of 0 or more, and 0 in empty slots"
            )
        index = self.expert_of_slot + 1 + (self.experts + 1) * np.arange(self.layers)[:, None]
        size = self.layers * (self.experts + 1)
        sums = np.bincount(index.ravel(), split.ravel(), size).reshape(self.layers, -1)[:, 1:]
        off = np.argwhere(np.abs(sums - 1) > 1e-6)
        if len(off):
            layer, expert = off[0]
            raise ValueError(
                f"{self.source}: expected shares that sum to 1, found {sums[layer, expert]:.6g} "
                f"for expert {expert} of layer {layer}"
            )
        split.flags.writeable = False
        return split


def count_copies(
    expert_of_slot: Int[np.ndarray, "*batch slots"], experts: int
) -> Int[np.ndarray, "*batch experts"]:
    """How many of the slots hold each expert, for any leading axes."""
    rows = expert_of_slot.reshape(-1, expert_of_slot.shape[-1])
    flat = rows + experts * np.arange(len(rows))[:, None]
    counts = np.bincount(flat.ravel(), minlength=len(rows) * experts)
    return counts.reshape(*expert_of_slot.shape[:-1], experts)
