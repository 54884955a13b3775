"""What can be said about a placement: the one home of every default, in Python and on the command
line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cmjax.hardware.units import parse_quantity
from cmjax.inputs import MOST_SIZE, check_count, check_number, check_seed
from cmjax.placement import Loads, Plan
from cmjax.placement.loads import MOST_EXPERTS, MOST_LAYERS
from cmjax.placement.rank_cost import RankCost
from cmjax.placement.routing import RoutingName

MOST_SLOTS = 2**20
"""Redundant slots of a layer."""
FormatName = Literal["own", "sglang", "vllm-ascend", "vllm", "tensorrt-llm"]
"""Formats that plans are written in; see `cmjax.placement.PLAN_FORMATS`."""

LoadsLike = str | Path | np.ndarray | Loads
"""Loads: a file or folder that `cmjax.placement.read_loads` reads, counts of shape
[layers, experts] or [windows, layers, experts], or `Loads`."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What to place.

    Attributes:
      domain: Which workload of several, by name; a pattern such as `*` places all it names as one
        family, each a workload.
      windows: Time windows to count token-level routes in, or to add recorded windows up to.
      family: More loads of the same model, each one more workload (its windows are added).
      train_windows: Plan on these windows only, A:B (from A to before B).
      first_layer: The model's number of the first layer in the loads (3 for DeepSeek-V3), where
        they have none.
    """

    domain: str | None = None
    windows: int = 1
    family: Sequence[LoadsLike] = ()
    train_windows: str | None = None
    first_layer: int | None = None

    def check(self) -> None:
        """Raise ValueError for numbers out of their range."""
        check_count("windows", self.windows)
        if self.first_layer is not None:
            check_count("first_layer", self.first_layer, least=0, most=MOST_LAYERS)

    def trained_on(self, windows: int) -> slice:
        """The windows to plan on, of so many.

        Raises: ValueError unless `train_windows` names some of them.
        """
        return _windows(self.train_windows or ":", windows, "--train-windows")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to place it.

    Attributes:
      ranks: Expert-parallel ranks (dies); needed unless an existing plan says them.
      redundant: Extra slots per layer, over all ranks together (default: the fewest with which the
        experts divide over the ranks).
      uneven: Do not fill up: ranks hold one expert more or less where they do not divide.
      nodes: Nodes the ranks are spread over (default: as few as hold them).
      model: Whose hidden and expert sizes the layer has; the number of experts is the loads'.
      tokens: Tokens a rank routes per step; the counts are scaled to it.
      multicast: Price a dispatch kernel that sends a token to a rank once, whatever experts of its
        are there (a token's experts taken as independent).
      groups: Expert groups of the router, which `greedy` and `hierarchical` keep inside a node.
      shared: Shared experts that live in slots, numbered after the routed ones.
      without_ranks: Ranks that hold nothing, such as dead ones: 3,17.
      memory_gib: Memory of a rank for all experts of these layers; redundant slots go where they
        save most.
      routing: How tokens choose among the copies of their expert (default: as the engine does that
        --format is for): even; nearest-copy, the own rank's, else the own node's, else spread
        (SGLang); rank-modulo, by the number of the sending rank (vLLM-Ascend).
      rank_cost: What a token costs on each rank, over an ordinary one: a file (.csv, .json, .npy)
        of a number a rank, or of a matrix, source rank by rank.
    """

    ranks: int | None = None
    redundant: int | None = None
    uneven: bool = False
    nodes: int | None = None
    model: str = "deepseek-r1"
    tokens: int = 96
    multicast: bool = False
    groups: int = 1
    shared: int = 0
    without_ranks: str | Sequence[int] = ""
    memory_gib: float | None = None
    routing: RoutingName | None = None
    rank_cost: RankCost | None = None

    def check(self) -> int:
        """The ranks; ValueError for numbers out of their range."""
        if self.ranks is None:
            raise ValueError("--ranks is needed to place experts")
        self.check_tokens()
        if self.memory_gib is not None:
            check_number("memory_gib", self.memory_gib, above=0, most=MOST_SIZE)
        if self.redundant is not None:
            check_count("redundant", self.redundant, least=0, most=MOST_SLOTS)
        check_count("groups", self.groups, least=0)
        most = self.shared if self.redundant is None else self.redundant
        if not 0 <= self.shared <= most:
            raise ValueError(
                f"shared experts live in redundant slots: shared must lie in 0 to "
                f"{self.redundant or 0}, got {self.shared}"
            )
        return self.ranks

    def extra_slots(self, experts: int) -> int:
        """Redundant slots of layers with so many experts: `redundant`, or the fewest that divide.

        Raises: ValueError for more than one copy of every expert on every rank.
        """
        ranks = self.check()
        if self.redundant is None:
            short = -(experts + self.shared) % ranks
            return self.shared + (0 if self.uneven else short)
        most = experts * (ranks - 1) + self.shared * ranks
        if self.redundant > most:
            raise ValueError(
                f"{experts} experts with {self.redundant} redundant slots on {ranks} ranks: a "
                f"second copy on a rank is of no use; redundant of at most {most} is"
            )
        return self.redundant

    def slots_per_rank(self, experts: int) -> int:
        """Slots of a rank, the fullest one where they are uneven."""
        return -(-(experts + self.extra_slots(experts)) // self.check())

    def check_tokens(self) -> None:
        """Raise ValueError unless a rank routes tokens, and ranks divide over nodes."""
        for name in ("ranks", "nodes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), most=MOST_EXPERTS)
        if self.ranks is not None and self.nodes is not None and self.ranks % self.nodes:
            raise ValueError(
                f"ranks must be a multiple of nodes: {self.ranks} ranks do not divide over "
                f"{self.nodes} nodes"
            )
        check_count("tokens", self.tokens)

    @property
    def dead_ranks(self) -> tuple[int, ...]:
        """`without_ranks`, sorted, each once; ValueError for anything else than ranks."""
        given = self.without_ranks
        parts = given.split(",") if isinstance(given, str) else map(str, given)
        parts = [part.strip() for part in parts if part.strip()]
        if not all(part.isdecimal() and len(part) < 10 for part in parts):
            raise ValueError(f"--without-ranks: expected ranks such as 3,17, got {given!r}")
        return tuple(sorted({int(part) for part in parts}))


@dataclass(frozen=True, kw_only=True)
class Search:
    """How to search.

    Attributes:
      method: search, gradient, greedy, hierarchical, one-spare, contiguous or random; robust for
        texts that are not in the recording: greedy or search on shrunk loads, or contiguous, as
        serves a workload left out best.
      objective: Of the time of all layers, over the windows: mean, worst, quantile:Q or cvar:Q.
      seconds: Time limit of the search, besides compiling it; Ctrl-C ends it too, with the best so
        far.
      seed: Of the search.
      shrink: How much of the differences between experts will not recur (0 to 1): the plan is made
        for loads so much nearer to even, as for texts unlike the recorded ones. `auto` leaves out
        windows in turn, or workloads of a family, and takes what serves them best.
      weighted: Let the copies of an expert take uneven shares of its tokens where that is faster.
      start_from: The plan that is running, to be improved within `moves` or `migration_budget`.
      moves: Experts that may be sent to a rank that did not hold them, over all layers.
      migration_budget: The same in bytes of the model's expert weights: 2GB, 512MiB.
    """

    method: str = "search"
    objective: str = "mean"
    seconds: float | None = None
    seed: int = 0
    shrink: float | Literal["auto"] = 0.0
    weighted: bool = False
    start_from: str | Path | Plan | None = None
    moves: int | None = None
    migration_budget: str | float | None = None

    def check(self) -> None:
        """Raise ValueError for numbers out of their range, a budget without a running plan, or a
        running plan without one."""
        if self.seconds is not None:
            check_number("seconds", self.seconds, least=0)
        check_seed("seed", self.seed)
        budgets = [self.moves, self.migration_budget]
        if self.start_from is None and budgets != [None, None]:
            raise ValueError("--moves and --migration-budget need --start-from PLAN")
        if self.start_from is not None and budgets.count(None) != 1:
            raise ValueError(
                "--start-from PLAN goes with one of --moves N and --migration-budget BYTES"
            )
        if self.moves is not None:
            check_count("moves", self.moves, least=0)
        if self.shrink != "auto" and not 0 <= self.shrink <= 1:
            raise ValueError(f"shrink must lie between 0 and 1, or be auto, got {self.shrink}")
        unlike = self.method != Search.method or self.weighted or self.shrink
        if self.start_from is not None and unlike:
            raise ValueError(
                "--start-from is improved by the method search only, not --weighted or --shrink"
            )

    def moves_allowed(self, expert_bytes: float) -> int:
        """`moves`, or as many experts as `migration_budget` holds.

        Raises: ValueError for a budget that is no bytes.
        """
        budget = self.migration_budget
        if budget is None:
            return self.moves or 0
        try:
            if not isinstance(budget, str) or not budget.strip()[-1:].isalpha():
                budget = f"{float(budget)} B"  # a bare number
            return int(parse_quantity(budget, "bytes") // expert_bytes)
        except (ValueError, OverflowError):
            raise ValueError(
                f"--migration-budget: expected bytes such as 2GB or 512MiB, got "
                f"{self.migration_budget!r}"
            ) from None


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How to judge it, beside the loads it is made for.

    Attributes:
      test: Judge on these loads too: a later recording, another domain (`FILE:DOMAIN`).
      test_windows: Judge on these windows too, A:B.
      step_tokens: Tokens a rank routes in the sampled steps whose balance is reported; 0 samples
        none.
    """

    test: LoadsLike | None = None
    test_windows: str | None = None
    step_tokens: int = 64

    def check(self) -> None:
        """Raise ValueError for a number out of its range, or two loads to judge on."""
        check_count("step_tokens", self.step_tokens, least=0)
        if self.test is not None and self.test_windows is not None:
            raise ValueError("--test and --test-windows: give one of them")

    def tested_on(self, windows: int) -> slice:
        """The windows to judge on, of so many.

        Raises: ValueError unless `test_windows` names some of them.
        """
        return _windows(self.test_windows or ":", windows, "--test-windows")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What becomes of it.

    Attributes:
      format: What is written: the plan with its evaluation, or the file that an engine loads.
      model_layers: Layers of the model, dense ones included, for files that go by their numbers
        (default: those of --model if it has as many experts, else up to the last recorded).
    """

    format: FormatName = "own"
    model_layers: int | None = None

    def check(self) -> None:
        """Raise ValueError for a number of layers that no model has."""
        if self.model_layers is not None:
            check_count("model_layers", self.model_layers, most=MOST_LAYERS)


def _windows(text: str, windows: int, option: str) -> slice:
    """The windows that `A:B` names of `windows`: from A to before B, either left out."""
    found = re.fullmatch(r"(\d{0,9}):(\d{0,9})", text)
    first, last = (int(found[1] or 0), int(found[2] or windows)) if found else (0, 0)
    if not 0 <= first < last <= windows:
        raise ValueError(f"{option} {text}: expected A:B with 0 <= A < B <= {windows} windows")
    return slice(first, last)
