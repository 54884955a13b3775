"""`cmjax place`: where experts live."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from cmjax import placement, report
from cmjax.commands.evaluate_plan import evaluate_plans
from cmjax.commands.output import bar, check_target, emit
from cmjax.commands.plan_output import (
    check_outputs,
    nodes_for,
    numbered,
    plan_document,
    reach_of,
    write_page,
)
from cmjax.cost.deployment import build_layer
from cmjax.cost.rows import row_time
from cmjax.hardware import load_machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Decide where experts live, by the priced time of the MoE layer on its slowest rank."""

    loads: tyro.conf.Positional[str]
    """.npy, .npz, .csv or .json of counts [layers, experts] or [windows, layers, experts] or of
    token-level routes, or a folder of them."""
    ranks: int | None = None
    """Expert-parallel ranks (dies); needed unless `--evaluate`'s plan says them."""
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

    # Existing plans, and files for engines.
    evaluate: str | None = None
    """Judge this plan instead of making one: a file of cmjax, SGLang, vLLM-Ascend (.json) or
    OmniPlacement (.npy, .npz; `file.npz:name` for one of several)."""
    format: Literal["own", "sglang", "vllm-ascend"] = "own"
    """What `--json` writes: the plan with its evaluation, or the file that an engine loads."""
    domain: str | None = None
    """Which workload of several, by name; with `--evaluate`, a pattern such as `*` for many."""
    first_layer: int | None = None
    """The model's number of the first layer in LOADS (3 for DeepSeek-V3), where LOADS has none."""

    html: Path | None = None
    """Write a page with the table and all pictures to this .html."""

    def run(self, console: Console) -> None:
        check_target(self.json, self.plot, self.html)
        if self.evaluate is not None:
            self._evaluate(console)
            return
        loads = placement.read_loads(self.loads, windows=self.windows, domain=self.domain)
        loads = numbered(loads, self.first_layer)
        check_outputs(self.format, self.html, loads)
        placed = self.solve(quiet=self.json == "-", loads=loads)
        if self.plot:
            placed.draw(self.plot)
        machine = load_machine(self.on)
        document = plan_document(
            placed.plans[self.method], loads, self.format,
            provenance={"method": self.method, "machine": machine.name, "loads": loads.source,
                        "windows": loads.counts.shape[0], "seed": self.seed},
            console=None if self.json in (None, "-") else console,
            method=self.method,
            machine=machine.name,
            evaluation={name: _score(score) for name, score in placed.scores.items()},
        )  # fmt: skip
        if self.html:
            nodes = self.nodes or nodes_for(placed.plans[self.method].ranks, machine)
            write_page(
                self.html, source=loads.source, loads=placed.loads, tokens=placed.tokens,
                scores=placed.scores, machine=machine, model=self.model, nodes=self.nodes,
                reach=reach_of(self.loads, self.domain, placed.plans, nodes),
            )  # fmt: skip
        emit(console, self.json, document, report.placement_table(placed.scores))

    def _evaluate(self, console: Console) -> None:
        """Judge the plans of a file; each on every workload chosen."""
        machine = load_machine(self.on)
        if self.domain is None:
            family = {"": placement.read_loads(self.loads, windows=self.windows)}
        else:
            family = placement.read_family(self.loads, windows=self.windows, domain=self.domain)
        family = {name: numbered(loads, self.first_layer) for name, loads in family.items()}
        if self.html is not None and len(family) > 1:
            raise ValueError(f"--html shows one workload, {self.domain!r} names {len(family)}")
        check_outputs("own", self.html, next(iter(family.values())))
        judged = evaluate_plans(
            str(self.evaluate), family, machine=machine, model=self.model, tokens=self.tokens,
            ranks=self.ranks, nodes=self.nodes,
        )  # fmt: skip
        scores = {name: found.score for name, found in judged.items()}
        tokens = {name: found.tokens for name, found in judged.items()}
        if (self.plot or self.html) and len({array.shape for array in tokens.values()}) > 1:
            raise ValueError(
                f"{self.evaluate}: the plans are for different ranks and cannot share a picture; "
                f"choose one by file.npz:name"
            )
        if self.plot:
            report.plot_placement(tokens, self.plot)
        if self.html:
            write_page(
                self.html, source=self.loads, loads=next(iter(judged.values())).loads,
                tokens=tokens, scores=scores, machine=machine, model=self.model, nodes=self.nodes,
            )  # fmt: skip
        result = {
            "machine": machine.name,
            "evaluation": {name: _score(score) for name, score in scores.items()},
        }
        emit(console, self.json, result, report.placement_table(scores))

    def solve(self, *, quiet: bool = False, loads: placement.Loads | None = None) -> "Placed":
        """Plans of the chosen method and of those it is compared with.

        Args:
          quiet: show no progress.
          loads: what to place instead of reading `self.loads`.
        """
        machine = load_machine(self.on)
        placement.check_method(self.method)
        if self.ranks is None:
            raise ValueError("--ranks is needed to place experts")
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

    @property
    def tokens(self) -> dict[str, np.ndarray]:
        """Tokens per layer and rank of one window: averaging windows would hide the imbalance."""
        last = self.loads.counts[-1]
        return {name: plan.tokens_per_rank(last) for name, plan in self.plans.items()}

    def draw(self, path: Path) -> None:
        """A heat map of ranks by layers for each plan."""
        report.plot_placement(self.tokens, path)


def _score(score: placement.Evaluation) -> dict[str, float]:
    return {
        "mean_par": score.mean_par,
        "worst_par": score.worst_par,
        "balancedness": score.balancedness,
        "time_ms": score.mean_time_s * 1e3,
        "gap_to_bound": score.gap,
    }
