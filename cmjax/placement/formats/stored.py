"""A placement as files keep it: layers may leave slots empty, have numbers, and split unevenly.

A rank receives

    tokens[r] = sum over filled slots s of rank r of  split[s] · load[expert[s]],

where `split` is 1 / copies[expert[s]] unless the file says otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cmjax.placement.loads import checked_labels
from cmjax.placement.problem import Plan, count_copies

EMPTY = -1
"""What an empty slot holds."""


@dataclass(frozen=True, eq=False)
class StoredPlan:
    """Which expert every slot holds, with all that a file may say about it.

    Attributes:
      experts: int32 `[layers, slots]`; slot s lives on rank s // (slots / ranks); -1 is an empty
        slot. Read-only.
      expert_count: logical experts per layer.
      ranks, nodes: expert-parallel ranks, and the nodes they are spread over, in order.
      layer_labels: the model's own number of each layer, or None if unknown.
      split: float64 `[layers, slots]`, the share of its expert's tokens that each slot serves, 0 in
        empty ones; None for an even split over copies.
      provenance: how the plan came about, as JSON can hold it.
      source: where it was read, for messages.
    Raises: ValueError, one line that starts with `source`: slots that do not divide over the ranks,
      an expert without a slot, shares that do not sum to 1.
    """

    experts: Int[np.ndarray, "layers slots"]
    expert_count: int
    ranks: int
    nodes: int = 1
    layer_labels: tuple[int, ...] | None = None
    split: Float[np.ndarray, "layers slots"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    source: str = "plan"

    def __post_init__(self):
        experts = np.asarray(self.experts)
        if experts.ndim != 2 or experts.dtype.kind not in "iu" or 0 in experts.shape:
            raise ValueError(
                f"{self.source}: expected whole numbers of shape [layers, slots], found "
                f"{experts.dtype} of shape {experts.shape}"
            )
        if self.ranks < 1 or experts.shape[1] % self.ranks:
            raise ValueError(
                f"{self.source}: {experts.shape[1]} slots do not divide over {self.ranks} ranks"
            )
        if self.nodes < 1 or self.ranks % self.nodes:
            raise ValueError(
                f"{self.source}: {self.ranks} ranks do not divide over {self.nodes} nodes"
            )
        wrong = np.argwhere((experts < EMPTY) | (experts >= self.expert_count))
        if len(wrong):
            layer, slot = wrong[0]
            raise ValueError(
                f"{self.source}: expected experts 0 to {self.expert_count - 1}, found "
                f"{experts[layer, slot]} in slot {slot} of layer {layer}"
            )
        experts = experts.astype(np.int32)
        experts.flags.writeable = False
        object.__setattr__(self, "experts", experts)
        lost = np.argwhere(self.copies == 0)
        if len(lost):
            layer, expert = lost[0]
            raise ValueError(f"{self.source}: expert {expert} of layer {layer} has no slot")
        object.__setattr__(
            self, "layer_labels", checked_labels(self.layer_labels, self.layers, self.source)
        )
        if self.split is not None:
            object.__setattr__(self, "split", self._checked_split())

    @classmethod
    def of(
        cls,
        plan: Plan,
        *,
        layer_labels: Sequence[int] | None = None,
        split: Float[np.ndarray, "layers slots"] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "StoredPlan":
        """A plan with what is known about it beside."""
        labels = None if layer_labels is None else tuple(layer_labels)
        return cls(
            plan.experts, plan.expert_count, plan.ranks, plan.nodes, labels, split, provenance or {}
        )

    @property
    def layers(self) -> int:
        return self.experts.shape[0]

    @property
    def slots(self) -> int:
        return self.experts.shape[1]

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.ranks

    @property
    def copies(self) -> Int[np.ndarray, "layers experts"]:
        """How many slots hold each expert."""
        return count_copies(self.experts + 1, self.expert_count + 1)[:, 1:]

    @property
    def filled(self) -> Int[np.ndarray, "layers ranks"]:
        """How many slots of each rank hold an expert."""
        return (self.experts != EMPTY).reshape(self.layers, self.ranks, -1).sum(-1)

    @property
    def share(self) -> Float[np.ndarray, "layers slots"]:
        """The share of its expert's tokens that each slot serves."""
        if self.split is not None:
            return self.split
        copies = np.take_along_axis(self.copies, np.maximum(self.experts, 0), axis=1)
        return np.where(self.experts == EMPTY, 0.0, 1 / copies)

    @property
    def plan(self) -> Plan:
        """The same as a `Plan`, which has no empty slots and splits evenly.

        Raises: ValueError if this one does not.
        """
        if self.split is not None:
            raise ValueError(f"{self.source}: a Plan splits evenly; this one has shares per slot")
        empty = np.argwhere(self.experts == EMPTY)
        if len(empty):
            layer, slot = empty[0]
            raise ValueError(
                f"{self.source}: a Plan has no empty slots; slot {slot} of layer {layer} is"
            )
        return Plan(self.experts, self.expert_count, self.ranks, self.nodes)

    def even(self) -> "StoredPlan":
        """The same slots, every expert's tokens split evenly over its copies."""
        return replace(self, split=None)

    def select(self, layers: Sequence[int]) -> "StoredPlan":
        """Some layers, by position, without the slots that no rank uses in them."""
        rows = list(layers)
        kept = self.experts[rows].reshape(len(rows), self.ranks, -1)
        used = (kept != EMPTY).any((0, 1))
        split = None
        if self.split is not None:
            split = self.split[rows].reshape(kept.shape)[..., used].reshape(len(rows), -1)
        labels = self.layer_labels
        return replace(
            self,
            experts=kept[..., used].reshape(len(rows), -1),
            split=split,
            layer_labels=None if labels is None else tuple(labels[row] for row in rows),
        )

    def tokens_per_rank(
        self, counts: Float[np.ndarray, "*batch layers experts"]
    ) -> Float[np.ndarray, "*batch layers ranks"]:
        """Tokens each rank receives; leading axes of `counts` (windows) are kept.

        Raises: ValueError if the last two axes are not this plan's layers and experts.
        """
        if np.shape(counts)[-2:] != (self.layers, self.expert_count):
            raise ValueError(
                f"{self.source}: expected counts of shape [..., {self.layers}, "
                f"{self.expert_count}] (layers, experts), found {np.shape(counts)}"
            )
        counts = np.asarray(counts, np.float64)
        index = np.broadcast_to(np.maximum(self.experts, 0), (*counts.shape[:-1], self.slots))
        per_slot = np.take_along_axis(counts, index, axis=-1) * self.share
        return per_slot.reshape(*counts.shape[:-1], self.ranks, -1).sum(-1)

    def _checked_split(self):
        split = np.asarray(self.split)
        if split.shape != self.experts.shape or split.dtype.kind not in "iuf":
            raise ValueError(
                f"{self.source}: expected a share for every slot, shape {self.experts.shape}, "
                f"found {split.dtype} of shape {split.shape}"
            )
        split = split.astype(np.float64)
        if not np.isfinite(split).all() or split.min() < 0 or split[self.experts == EMPTY].any():
            raise ValueError(
                f"{self.source}: expected finite shares of 0 or more, and 0 in empty slots"
            )
        total = np.zeros((self.layers, self.expert_count + 1))
        np.add.at(total, (np.arange(self.layers)[:, None], self.experts), split)
        off = np.argwhere(np.abs(total[:, :-1] - 1) > 1e-6)
        if len(off):
            layer, expert = off[0]
            raise ValueError(
                f"{self.source}: expected shares that sum to 1, found {total[layer, expert]:.6g} "
                f"for expert {expert} of layer {layer}"
            )
        split.flags.writeable = False
        return split
