"""`cmjax place`: where experts live."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from cmjax import placement, report
from cmjax.commands.evaluate_plan import evaluate_plans, numbered
from cmjax.commands.output import bar, check_target, emit
from cmjax.cost.deployment import build_layer
from cmjax.cost.rows import row_time
from cmjax.hardware import load_machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Decide where experts live, by the priced time of the MoE layer on its slowest rank."""

    loads: tyro.conf.Positional[str]
    """.npy, .npz, .csv or .json of counts [layers, experts] or [windows, layers, experts]."""
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

    def run(self, console: Console) -> None:
        check_target(self.json, self.plot)
        if self.evaluate is not None:
            self._evaluate(console)
            return
        loads = numbered(
            placement.read_loads(self.loads, windows=self.windows, domain=self.domain),
            self.first_layer,
        )
        if self.format == "sglang" and loads.layer_labels is None:
            raise ValueError(
                f"{self.loads}: SGLang's file numbers layers as the model does, dense ones "
                f"included; give --first-layer (3 for DeepSeek-V3)"
            )
        placed = self.solve(quiet=self.json == "-", loads=loads)
        if self.plot:
            placed.draw(self.plot)
        plan = placed.plans[self.method]
        if self.format == "vllm-ascend":
            plan = _addressable(plan, placed.loads, console, quiet=self.json == "-")
        stored = placement.StoredPlan.of(
            plan,
            layer_labels=loads.layer_labels,
            provenance={
                "method": self.method, "machine": load_machine(self.on).name,
                "loads": self.loads, "seed": self.seed,
            },
        )  # fmt: skip
        result = placement.plan_text(stored, self.format)
        if self.format == "own":
            evaluation = {name: _score(score) for name, score in placed.scores.items()}
            result = placement.plan_text(stored, evaluation=evaluation)
        emit(console, self.json, result, report.placement_table(placed.scores))

    def _evaluate(self, console: Console) -> None:
        """Judge the plans of a file; each on every workload chosen."""
        machine = load_machine(self.on)
        if self.domain is None:
            family = {"": placement.read_loads(self.loads, windows=self.windows)}
        else:
            family = placement.read_family(self.loads, windows=self.windows, domain=self.domain)
        scores = evaluate_plans(
            str(self.evaluate),
            {name: numbered(loads, self.first_layer) for name, loads in family.items()},
            machine=machine, model=self.model, tokens=self.tokens,
            ranks=self.ranks, nodes=self.nodes,
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

    def draw(self, path: Path) -> None:
        """Tokens per rank and layer of one window: averaging windows would hide the imbalance."""
        last = self.loads.counts[-1]
        tokens = {name: plan.tokens_per_rank(last) for name, plan in self.plans.items()}
        report.plot_placement(tokens, path)


def _addressable(plan, loads, console, *, quiet):
    """The plan with no expert twice on a rank, as vLLM-Ascend needs it; says what that costs."""
    found = placement.once_per_rank(plan, loads)
    changed = int((found.experts != plan.experts).sum())
    if changed and not quiet:
        par = [
            float((tokens.max(-1) / tokens.mean(-1)).mean())
            for tokens in (p.tokens_per_rank(loads.counts) for p in (plan, found))
        ]
        console.print(
            f"vLLM-Ascend addresses one copy of an expert per rank: {changed} slots changed, "
            f"mean PAR {par[0]:.4f} -> {par[1]:.4f}"
        )
    return found


def _score(score: placement.Evaluation) -> dict[str, float]:
    return {
        "mean_par": score.mean_par,
        "worst_par": score.worst_par,
        "balancedness": score.balancedness,
        "time_ms": score.mean_time_s * 1e3,
        "gap_to_bound": score.gap,
    }
