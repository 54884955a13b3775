"""`cmjax place`: where experts live."""

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console

from cmjax import placement, report
from cmjax.commands.output import bar, check_target, emit
from cmjax.cost.deployment import build_layer
from cmjax.cost.rows import row_time
from cmjax.hardware import Supernode, load_machine
from cmjax.placement.search import OnStep
from cmjax.placement.shared import with_shared
from cmjax.placement.token_ids import read_ids
from cmjax.program.step import Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Decide where experts live, by the priced time of the MoE layer on its slowest rank."""

    loads: tyro.conf.Positional[str]
    """.npy, .npz, .csv or .json of counts [layers, experts] or [windows, layers, experts]."""
    ranks: int
    """Expert-parallel ranks (dies)."""
    redundant: int = 0
    """Extra slots per layer, over all ranks together."""
    nodes: int | None = None
    """Nodes the ranks are spread over (default: as few as hold them)."""
    method: str = "search"
    """search, greedy, hierarchical, one-spare, contiguous or random."""
    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    model: str = "deepseek-r1"
    """Whose hidden and expert sizes the layer has; the number of experts is the file's."""
    tokens: int = 96
    """Tokens a rank routes per step; the counts are scaled to it."""
    windows: int = 1
    """Time windows to count token-level routes in."""
    seconds: float | None = None
    """Time limit of the search; Ctrl-C ends it too, with the best so far."""
    seed: int = 0
    """Of the search."""
    json: str | None = None
    """Write the plan as JSON to this file; `-` is standard output."""
    plot: Path | None = None
    """Draw tokens per rank and layer, per method, to this .png or .svg."""

    # What counts, and where it is judged.
    objective: str = "mean"
    """Of a layer's time over the windows: mean, worst, quantile:Q or cvar:Q."""
    family: tuple[str, ...] = ()
    """More loads of the same model, each one more workload (its windows are added)."""
    train_windows: str | None = None
    """Plan on these windows only, A:B (from A to before B)."""
    test_windows: str | None = None
    """Judge on these windows too, A:B."""
    test: str | None = None
    """Judge on these loads too: a later recording, another domain."""
    step_tokens: int = 64
    """Tokens a rank routes in the sampled steps whose balance is reported; 0 samples none."""

    # What is given.
    groups: int = 1
    """Expert groups of the router, which `greedy` and `hierarchical` keep inside a node."""
    shared: int = 0
    """Shared experts that live in slots, numbered after the routed ones."""
    without_ranks: str = ""
    """Ranks that hold nothing, such as dead ones: 3,17."""
    memory_gib: float | None = None
    """Memory of a rank for all experts of these layers; redundant slots go where they save most."""
    start_from: Path | None = None
    """The plan that is running (JSON), to be improved with at most `--moves`."""
    moves: int | None = None
    """Experts that may be sent to a rank that did not hold them, over all layers."""
    weighted: bool = False
    """Let the copies of an expert take uneven shares of its tokens where that is faster."""

    def run(self, console: Console) -> None:
        check_target(self.json, self.plot)
        placed = self.solve(quiet=self.json == "-")
        if self.plot:
            placed.draw(self.plot)
        result = json.loads(placed.plans[self.method].to_json()) | {
            "method": self.method,
            "objective": self.objective,
            "machine": load_machine(self.on).name,
            "evaluation": {name: _score(found) for name, found in placed.judged.items()},
        }
        emit(console, self.json, result, report.comparison_table(placed.judged, self.objective))

    def solve(self, *, quiet: bool = False, loads: placement.Loads | None = None) -> "Placed":
        """Plans of the chosen method and of those it is compared with.

        Args:
          quiet: show no progress.
          loads: what to place instead of reading `self.loads`.
        """
        machine = load_machine(self.on)
        placement.check_method(self.method)
        self._check()
        given, routes = loads is not None, None
        if loads is None:
            loads = placement.read_loads(self.loads, windows=self.windows)
        for path in self.family:
            loads = _joined(loads, placement.read_loads(path, windows=self.windows))
        train, test = self._split(loads)
        layer = self._layer(machine, loads.experts)
        train, test = (
            None if part is None
            else with_shared(part, self.shared, layer.copies).scaled(
                float(self.tokens) * self.ranks * (layer.copies + self.shared)
            )
            for part in (train, test)
        )  # fmt: skip
        assert train is not None
        if not given and self.shared == 0 and (self.nodes or 1) > 1:
            routes = read_ids(self.loads)
        seen = self._seen(routes)
        time_s = row_time(layer, machine, tokens=self.tokens)
        problem = self._problem(train, time_s, machine)
        methods = tuple(dict.fromkeys((*placement.BASELINES, self.method)))
        judging = {
            "test": test, "routes": seen[1], "seed": self.seed,
            "step_assignments": self.step_tokens * len(problem.alive) * layer.copies,
        }  # fmt: skip
        with _progress(quiet) as on_step:
            judged = placement.compare(
                problem, methods, time_s,
                weighted=self.weighted, group_by=seen[0],
                seconds=self.seconds, on_step=on_step, **judging,
            )  # fmt: skip
            if self.start_from is not None:
                bound_s = judged[self.method].bound_s
                for name, plan in self._repaired(problem, time_s, on_step).items():
                    judged[name] = placement.judge_plan(plan, problem, time_s, bound_s, **judging)
        return Placed(train, judged)

    def _check(self):
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.step_tokens < 0:
            raise ValueError(f"step_tokens must be 0 or more, got {self.step_tokens}")
        if not 0 <= self.shared <= self.redundant:
            raise ValueError(
                f"shared experts live in redundant slots: shared must lie in 0 to "
                f"{self.redundant}, got {self.shared}"
            )
        if (self.start_from is None) != (self.moves is None):
            raise ValueError("--start-from PLAN and --moves N go together")
        if self.moves is not None and self.moves < 0:
            raise ValueError(f"moves must be 0 or more, got {self.moves}")
        if self.test is not None and self.test_windows is not None:
            raise ValueError("--test and --test-windows: give one of them")
        if self.start_from is not None and self.method != "search":
            raise ValueError("--start-from is improved by the method search only")

    def _split(self, loads) -> tuple[placement.Loads, placement.Loads | None]:
        """What to plan on, and what to judge on."""
        train, test = loads, None
        if self.train_windows is not None:
            train = _windows(loads, self.train_windows, "--train-windows")
        if self.test_windows is not None:
            test = _windows(loads, self.test_windows, "--test-windows")
        if self.test is not None:
            test = placement.read_loads(self.test)
            _same_experts(loads, test)
        return train, test

    def _seen(self, ids):
        """Routes of the windows to plan on, and of those to judge on."""
        if ids is None or self.family:
            return None, None
        parts = np.array_split(ids, self.windows)
        train = np.concatenate(_windows_of(parts, self.train_windows or ":", "--train-windows"))
        if self.test_windows is None:
            return train, train
        return train, np.concatenate(_windows_of(parts, self.test_windows, "--test-windows"))

    def _layer(self, machine: Supernode, experts: int, redundant: int | None = None) -> Step:
        return build_layer(
            self.model, machine,
            ranks=self.ranks, nodes=self.nodes, experts=experts + self.shared,
            redundant=(self.redundant if redundant is None else redundant) - self.shared,
        )  # fmt: skip

    def _problem(self, loads, time_s, machine) -> placement.Problem:
        dead = [part.strip() for part in self.without_ranks.split(",") if part.strip()]
        if not all(part.isdecimal() for part in dead):
            raise ValueError(f"--without-ranks: expected ranks such as 3,17, got {dead}")
        problem = placement.Problem(
            loads, self.ranks, self.redundant - self.shared, self.nodes or 1, self.groups,
            objective=placement.Risk.parse(self.objective),
            without_ranks=tuple(sorted({int(part) for part in dead})),
        )  # fmt: skip
        if self.memory_gib is None:
            return problem
        small, large = (
            _weight_bytes(self._layer(machine, loads.experts - self.shared, redundant))
            for redundant in (self.redundant, self.redundant + self.ranks)
        )
        slots = int(self.memory_gib * 2**30 / (large - small))
        return placement.choose_slots(problem, time_s, slots)

    def _repaired(self, problem, time_s, on_step) -> dict[str, placement.Plan]:
        """The running plan, and the better one within the moves in place of a free one."""
        current = placement.Plan.from_json(Path(str(self.start_from)))
        plan = placement.repair(
            problem, current, time_s, moves=int(self.moves or 0), seed=self.seed, on_step=on_step
        )
        return {"running": current, self.method: plan}


@dataclasses.dataclass(frozen=True)
class Placed:
    """Plans by method, and how good each is."""

    loads: placement.Loads
    judged: dict[str, placement.Judged]

    @property
    def plans(self) -> dict[str, placement.Plan]:
        return {name: found.plan for name, found in self.judged.items()}

    @property
    def scores(self) -> dict[str, placement.Evaluation]:
        """How good each is under the loads it was made for."""
        return {name: found.made_for for name, found in self.judged.items()}

    def draw(self, path: Path) -> None:
        """Tokens per rank and layer of one window: averaging windows would hide the imbalance."""
        last = self.loads.counts[-1]
        shown = [name for name in self.plans if name not in ("random", "hierarchical", "one-spare")]
        report.plot_placement(
            {name: self.plans[name].tokens_per_rank(last) for name in shown}, path
        )


@contextmanager
def _progress(quiet: bool) -> Iterator[OnStep]:
    with bar(quiet=quiet) as progress:
        task = progress.add_task("placing")

        def on_step(done: int, total: int, best_s: float) -> None:
            progress.update(task, total=total, completed=done, description=f"{best_s * 1e3:.3f} ms")

        yield on_step


def _windows(loads, text, option):
    return dataclasses.replace(loads, counts=_windows_of(loads.counts, text, option))


def _windows_of(windows, text, option):
    found = re.fullmatch(r"(\d*):(\d*)", text)
    count = len(windows)
    first, last = (int(found[1] or 0), int(found[2] or count)) if found else (0, 0)
    if not 0 <= first < last <= count:
        raise ValueError(f"{option} {text}: expected A:B with 0 <= A < B <= {count} windows")
    return windows[first:last]


def _same_experts(loads, other):
    if other.counts.shape[1:] != loads.counts.shape[1:]:
        raise ValueError(
            f"{other.source}: {other.layers} layers of {other.experts} experts; {loads.source} has "
            f"{loads.layers} of {loads.experts}"
        )


def _joined(loads, other):
    """Windows of both, each scaled to the tokens of the first: workloads count alike."""
    _same_experts(loads, other)
    total = float(loads.counts[0].sum(-1).mean())
    counts = [part.scaled(total).counts for part in (loads, other)]
    return dataclasses.replace(loads, counts=np.concatenate(counts))


def _weight_bytes(layer: Step) -> float:
    """Weights that a rank holds of a layer."""
    leaves = jax.tree.leaves(layer.args[0])
    return sum(float(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves) / layer.ranks


def _score(found: placement.Judged) -> dict[str, float]:
    score = {
        "mean_par": found.made_for.mean_par,
        "worst_par": found.made_for.worst_par,
        "balancedness": found.made_for.balancedness,
        "time_ms": found.made_for.mean_time_s * 1e3,
        "objective_ms": found.objective_s * 1e3,
        "gap_to_bound": found.gap,
        "solve_s": found.solve_s,
    }
    if found.served is not None:
        score |= {
            "test_time_ms": found.served.mean_time_s * 1e3,
            "test_mean_par": found.served.mean_par,
        }
    if found.step_par is not None:
        score["step_par"] = float(found.step_par.mean())
    if found.reach is not None:
        score |= {
            "ranks_per_token": float(found.reach.ranks.mean()),
            "nodes_per_token": float(found.reach.nodes.mean()),
        }
    return score
