"""A placement: which expert each physical slot of each rank holds, and how its tokens are split.

Slot s lives on rank s // slots_per_rank. Where an expert's tokens are split evenly over its copies,
a rank receives

    tokens[r] = sum over slots s of rank r of  load[expert[s]] / copies[expert[s]].
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

_FORMAT = "cmjax-placement"
_VERSION = 1
EMPTY = -1
"""What an empty slot holds."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The expert that each physical slot holds.

    Attributes:
      experts: int32 `[layers, slots]`; slot s lives on rank s // (slots / ranks); -1 is an empty
        slot: of a dead rank, or of a layer with fewer slots than another. Read-only.
      expert_count: logical experts per layer.
      ranks: expert-parallel ranks.
      nodes: nodes the ranks are spread over, in order.
      layer_labels: the model's own number of each layer, where known.
      split: float64 `[layers, slots]`, the share of its expert's tokens that a slot serves, 0 in
        empty slots; None is an even split over copies.
    Raises: ValueError if a slot names no expert, an expert of some layer has no slot, labels are
      not one per layer, or the shares of an expert do not sum to 1.
    """

    experts: Int[np.ndarray, "layers slots"]
    expert_count: int
    ranks: int
    nodes: int = 1
    layer_labels: tuple[int, ...] | None = None
    split: Float[np.ndarray, "layers slots"] | None = None

    def __post_init__(self):
        experts = np.asarray(self.experts)
        if experts.ndim != 2 or experts.dtype.kind not in "iu" or 0 in experts.shape:
            raise ValueError(
                f"Plan: expected integers of shape [layers, slots], got {experts.dtype} "
                f"of shape {experts.shape}"
            )
        if self.ranks < 1 or experts.shape[1] % self.ranks:
            raise ValueError(
                f"Plan: {experts.shape[1]} slots do not divide over {self.ranks} ranks"
            )
        if self.nodes < 1 or self.ranks % self.nodes:
            raise ValueError(f"Plan: {self.ranks} ranks do not divide over {self.nodes} nodes")
        if experts.min() < EMPTY or experts.max() >= self.expert_count:
            raise ValueError(
                f"Plan: slots must name experts 0 to {self.expert_count - 1} (or {EMPTY}, empty), "
                f"found {experts.min()} to {experts.max()}"
            )
        experts = experts.astype(np.int32)
        experts.flags.writeable = False
        object.__setattr__(self, "experts", experts)
        lost = np.argwhere(self.copies == 0)
        if len(lost):
            layer, expert = lost[0]
            raise ValueError(f"Plan: expert {expert} of layer {layer} has no slot")
        object.__setattr__(self, "layer_labels", check_labels(self.layer_labels, len(experts)))
        if self.split is not None:
            object.__setattr__(self, "split", self._checked_split())

    @property
    def layers(self) -> int:
        return self.experts.shape[0]

    @property
    def slots_per_rank(self) -> int:
        return self.experts.shape[1] // self.ranks

    @cached_property
    def copies(self) -> Int[np.ndarray, "layers experts"]:
        """How many slots hold each expert."""
        return count_copies(self.experts + 1, self.expert_count + 1)[:, 1:]

    @cached_property
    def alive(self) -> Bool[np.ndarray, "ranks"]:
        """Ranks that hold an expert in some layer."""
        return (self.experts != EMPTY).reshape(self.layers, self.ranks, -1).any((0, 2))

    @cached_property
    def share(self) -> Float[np.ndarray, "layers slots"]:
        """The share of its expert's tokens that each slot serves; 0 in empty slots."""
        if self.split is not None:
            return self.split
        copies = np.take_along_axis(self.copies, np.maximum(self.experts, 0), axis=1)
        return np.where(self.experts == EMPTY, 0.0, 1 / copies)

    def tokens_per_rank(
        self, counts: Float[np.ndarray, "*batch layers experts"]
    ) -> Float[np.ndarray, "*batch layers ranks"]:
        """Tokens each rank receives when every expert splits its tokens as the plan says.

        Args:
          counts: tokens per layer and expert, any leading axes (windows).
        Raises: ValueError if the last two axes are not this plan's layers and experts.
        """
        if np.shape(counts)[-2:] != (self.layers, self.expert_count):
            raise ValueError(
                f"Plan.tokens_per_rank: expected counts of shape [..., {self.layers}, "
                f"{self.expert_count}], got {np.shape(counts)}"
            )
        counts = np.asarray(counts, np.float64)
        index = np.maximum(self.experts, 0)
        index = np.broadcast_to(index, (*counts.shape[:-1], index.shape[1]))
        per_slot = np.take_along_axis(counts, index, axis=-1) * self.share
        return per_slot.reshape(*per_slot.shape[:-1], self.ranks, self.slots_per_rank).sum(-1)

    def to_json(self) -> str:
        """This plan as JSON text, one line per layer's list of slots."""
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "experts": self.expert_count,
            "ranks": self.ranks,
            "nodes": self.nodes,
            "slots_per_rank": self.slots_per_rank,
        }
        if self.layer_labels is not None:
            head["layer_labels"] = list(self.layer_labels)
        tables = {"expert_of_slot": self.experts}
        if self.split is not None:
            tables["split_of_slot"] = self.split
        parts = [json.dumps(head, indent=1)[:-2]]
        for name, table in tables.items():
            rows = ",\n  ".join(json.dumps(row) for row in table.tolist())
            parts.append(f' "{name}": [\n  {rows}\n ]')
        return ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | Path) -> "Plan":
        """Read a plan from JSON text, or from a file if given a `Path`; validates it.

        Raises: ValueError if the text is no plan of this format and version.
        """
        source = f"{text}" if isinstance(text, Path) else "Plan.from_json"
        try:
            data = json.loads(text.read_text() if isinstance(text, Path) else text)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{source}: expected a JSON placement, got: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"{source}: expected an object with format {_FORMAT!r}")
        if data.get("version") != _VERSION:
            raise ValueError(f"{source}: expected version {_VERSION}, got {data.get('version')!r}")
        split, labels = data.get("split_of_slot"), data.get("layer_labels")
        try:
            return cls(
                np.array(data["expert_of_slot"]),
                int(data["experts"]),
                int(data["ranks"]),
                int(data["nodes"]),
                None if labels is None else tuple(labels),
                None if split is None else np.array(split, np.float64),
            )
        except KeyError as error:
            raise ValueError(f"{source}: the placement lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None

    def _checked_split(self):
        split = np.array(self.split, np.float64)
        if split.shape != self.experts.shape or not (split >= 0).all():
            raise ValueError(
                f"Plan: expected split as shares of 0 or more, of shape {self.experts.shape}, got "
                f"{split.shape}"
            )
        index = self.experts + 1 + (self.expert_count + 1) * np.arange(self.layers)[:, None]
        size = self.layers * (self.expert_count + 1)
        sums = np.bincount(index.ravel(), split.ravel(), size).reshape(self.layers, -1)
        wrong = np.argwhere(np.abs(sums - (np.arange(sums.shape[1]) > 0)) > 1e-6)
        if len(wrong):
            layer, expert = wrong[0]
            what = f"expert {expert - 1}" if expert else "the empty slots"
            raise ValueError(
                f"Plan: shares of {what} of layer {layer} sum to {sums[layer, expert]:g}, "
                f"expected {int(expert > 0)}"
            )
        split.flags.writeable = False
        return split


def count_copies(
    experts: Int[np.ndarray, "*batch slots"], expert_count: int
) -> Int[np.ndarray, "*batch experts"]:
    """How many of the slots hold each expert, for any leading axes."""
    rows = experts.reshape(-1, experts.shape[-1])
    flat = rows + expert_count * np.arange(len(rows))[:, None]
    counts = np.bincount(flat.ravel(), minlength=len(rows) * expert_count)
    return counts.reshape(*experts.shape[:-1], expert_count)


def check_labels(labels: Sequence[int] | None, layers: int) -> tuple[int, ...] | None:
    """Layer labels as a tuple.

    Raises: ValueError unless they are `layers` different whole numbers of 0 or more.
    """
    if labels is None:
        return None
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in labels)
    if not whole or len(labels) != layers or len(set(labels)) != layers or min(labels) < 0:
        raise ValueError(
            f"Plan: expected layer_labels as {layers} different whole numbers of 0 or more, got "
            f"{', '.join(map(str, labels)) or 'none'}"
        )
    return tuple(int(label) for label in labels)
