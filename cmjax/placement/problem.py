"""The placement problem and its answer: which expert each physical slot of each rank holds.

A layer has `experts` routed experts and `slots = experts + redundant` physical slots, the same
number on every rank; slot s lives on rank s // slots_per_rank. An expert's tokens are split evenly
over its copies, so a rank receives

    tokens[r] = sum over slots s of rank r of  load[expert[s]] / copies[expert[s]].
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from cmjax.placement.loads import Loads

_FORMAT = "cmjax-placement"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Problem:
    """Loads to place, and the machine's side of the bargain.

    Attributes:
      loads: tokens per window, layer and expert.
      ranks: expert-parallel ranks (dies, or NPUs where one process drives both dies).
      redundant: extra slots per layer, over all ranks together.
      nodes: nodes the ranks are spread over, in order and evenly.
      groups: the router's expert groups (`n_group` of the model). Only when they divide over the
        nodes does the greedy method keep each group inside one node.
    Raises: ValueError if ranks, nodes, slots or groups do not divide; it says what would.
    """

    loads: Loads
    ranks: int
    redundant: int = 0
    nodes: int = 1
    groups: int = 1

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
        over = self.slots % self.ranks
        if over:
            fits = [self.redundant - over, self.redundant + self.ranks - over]
            fits = " or ".join(str(fit) for fit in fits if fit >= 0)
            raise ValueError(
                f"Problem: {self.experts} experts + {self.redundant} redundant slots do not divide "
                f"over {self.ranks} ranks; the nearest redundant that does is {fits}"
            )

    @property
    def layers(self) -> int:
        return self.loads.counts.shape[1]

    @property
    def experts(self) -> int:
        return self.loads.counts.shape[2]

    @property
    def slots(self) -> int:
        return self.experts + self.redundant

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.ranks

    def plan(self, experts: Int[np.ndarray, "layers slots"]) -> "Plan":
        """A plan for this problem from the expert of every slot; validates it."""
        expected = (self.layers, self.slots)
        if np.shape(experts) != expected:
            raise ValueError(
                f"Problem.plan: expected slots of shape {expected} (layers, slots), "
                f"got {np.shape(experts)}"
            )
        return Plan(np.asarray(experts), self.experts, self.ranks, self.nodes)


@dataclass(frozen=True, eq=False)
class Plan:
    """The expert that each physical slot holds.

    Attributes:
      experts: int32 `[layers, slots]`; slot s lives on rank s // (slots / ranks). Read-only.
      expert_count: logical experts per layer.
      ranks: expert-parallel ranks.
      nodes: nodes the ranks are spread over, in order.
    Raises: ValueError if a slot names no expert, or an expert of some layer has no slot.
    """

    experts: Int[np.ndarray, "layers slots"]
    expert_count: int
    ranks: int
    nodes: int = 1

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
        if experts.min() < 0 or experts.max() >= self.expert_count:
            raise ValueError(
                f"Plan: slots must name experts 0 to {self.expert_count - 1}, found "
                f"{experts.min()} to {experts.max()}"
            )
        experts = experts.astype(np.int32)
        experts.flags.writeable = False
        object.__setattr__(self, "experts", experts)
        lost = np.argwhere(self.copies == 0)
        if len(lost):
            layer, expert = lost[0]
            raise ValueError(f"Plan: expert {expert} of layer {layer} has no slot")

    @property
    def layers(self) -> int:
        return self.experts.shape[0]

    @property
    def slots_per_rank(self) -> int:
        return self.experts.shape[1] // self.ranks

    @cached_property
    def copies(self) -> Int[np.ndarray, "layers experts"]:
        """How many slots hold each expert."""
        return count_copies(self.experts, self.expert_count)

    def tokens_per_rank(
        self, counts: Float[np.ndarray, "*batch layers experts"]
    ) -> Float[np.ndarray, "*batch layers ranks"]:
        """Tokens each rank receives when every expert splits its tokens evenly over its copies.

        Args:
          counts: tokens per layer and expert, any leading axes (windows).
        Raises: ValueError if the last two axes are not this plan's layers and experts.
        """
        if np.shape(counts)[-2:] != (self.layers, self.expert_count):
            raise ValueError(
                f"Plan.tokens_per_rank: expected counts of shape [..., {self.layers}, "
                f"{self.expert_count}], got {np.shape(counts)}"
            )
        per_copy = np.asarray(counts, np.float64) / self.copies
        index = np.broadcast_to(self.experts, (*per_copy.shape[:-1], self.experts.shape[1]))
        per_slot = np.take_along_axis(per_copy, index, axis=-1)
        return per_slot.reshape(*per_slot.shape[:-1], self.ranks, self.slots_per_rank).sum(-1)

    def to_json(self) -> str:
        """This plan as JSON text, one line per layer's list of slots."""
        rows = ",\n  ".join(json.dumps(row) for row in self.experts.tolist())
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "experts": self.expert_count,
            "ranks": self.ranks,
            "nodes": self.nodes,
            "slots_per_rank": self.slots_per_rank,
        }
        return json.dumps(head, indent=1)[:-2] + f',\n "expert_of_slot": [\n  {rows}\n ]\n}}\n'

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
        try:
            slots = np.array(data["expert_of_slot"])
            return cls(slots, int(data["experts"]), int(data["ranks"]), int(data["nodes"]))
        except KeyError as error:
            raise ValueError(f"{source}: the placement lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None


def count_copies(
    experts: Int[np.ndarray, "*batch slots"], expert_count: int
) -> Int[np.ndarray, "*batch experts"]:
    """How many of the slots hold each expert, for any leading axes."""
    rows = experts.reshape(-1, experts.shape[-1])
    flat = rows + expert_count * np.arange(len(rows))[:, None]
    counts = np.bincount(flat.ravel(), minlength=len(rows) * expert_count)
    return counts.reshape(*experts.shape[:-1], expert_count)
