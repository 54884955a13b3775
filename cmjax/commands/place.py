"""`cmjax place`: where experts live."""

import dataclasses
import json
from pathlib import Path

import tyro
from rich.console import Console

from cmjax import placement, report
from cmjax.commands.output import bar, check_target, emit
from cmjax.cost.deployment import build_layer
from cmjax.cost.rows import row_time
from cmjax.hardware import load_machine


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
    method: str = "gradient"
    """gradient, greedy or contiguous."""
    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    model: str = "deepseek-r1"
    """Whose hidden and expert sizes the layer has; the number of experts is the file's."""
    tokens: int = 96
    """Tokens a rank routes per step; the counts are scaled to it."""
    windows: int = 1
    """Time windows to count token-level routes in."""
    seconds: float | None = None
    """Time limit of the search."""
    seed: int = 0
    """Of the search."""
    json: str | None = None
    """Write the plan as JSON to this file; `-` is standard output."""
    plot: Path | None = None
    """Draw tokens per rank and layer, per method, to this .png or .svg."""

    def run(self, console: Console) -> None:
        check_target(self.json, self.plot)
        placed = self.solve(quiet=self.json == "-")
        if self.plot:
            placed.draw(self.plot)
        result = json.loads(placed.plans[self.method].to_json()) | {
            "method": self.method,
            "machine": load_machine(self.on).name,
            "evaluation": {name: _score(score) for name, score in placed.scores.items()},
        }
        emit(console, self.json, result, report.placement_table(placed.scores))

    def solve(self, *, quiet: bool = False, loads: placement.Loads | None = None) -> "Placed":
        """Plans of the chosen method and of those it is compared with.

        Args:
          quiet: show no progress.
          loads: what to place instead of reading `self.loads`.
        """
        machine = load_machine(self.on)
        placement.check_method(self.method)
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if loads is None:
            loads = placement.read_loads(self.loads, windows=self.windows)
        layer = build_layer(
            self.model,
            machine,
            ranks=self.ranks,
            nodes=self.nodes,
            experts=loads.experts,
            redundant=self.redundant,
        )
        loads = loads.scaled(float(self.tokens) * self.ranks * layer.copies)
        problem = placement.Problem(loads, self.ranks, self.redundant, self.nodes or 1)
        time_s = row_time(layer, machine, tokens=self.tokens)
        plans = {}
        with bar(quiet=quiet) as progress:
            task = progress.add_task("placing")

            def on_step(done: int, total: int, best: float) -> None:
                progress.update(
                    task, total=total, completed=done, description=f"{best * 1e3:.3f} ms"
                )

            for method in dict.fromkeys(("contiguous", "greedy", self.method)):
                plans[method] = placement.place(
                    problem, method, time_s, seed=self.seed, seconds=self.seconds, on_step=on_step
                )
        scores = {name: placement.evaluate(plan, loads, time_s) for name, plan in plans.items()}
        return Placed(loads, plans, scores)


@dataclasses.dataclass(frozen=True)
class Placed:
    """Plans by method, and how good each is under the loads it was made for."""

    loads: placement.Loads
    plans: dict[str, placement.Plan]
    scores: dict[str, placement.Evaluation]

    def draw(self, path: Path) -> None:
        """Tokens per rank and layer of one window: averaging windows would hide the imbalance."""
        last = self.loads.counts[-1]
        tokens = {name: plan.tokens_per_rank(last) for name, plan in self.plans.items()}
        report.plot_placement(tokens, path)


def _score(score: placement.Evaluation) -> dict[str, float]:
    return {
        "mean_par": score.mean_par,
        "worst_par": score.worst_par,
        "balancedness": score.balancedness,
        "time_ms": score.mean_time_s * 1e3,
        "gap_to_bound": score.gap,
    }
