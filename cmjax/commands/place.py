"""`cmjax place`: where experts live."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cmjax import placement, report
from cmjax.console import check_target, emit, show_progress
from cmjax.deploy.place_options import Export, Judging, Recording, Search, Target
from cmjax.deploy.placed import evaluate, place_with
from cmjax.deploy.placement_result import Placement
from cmjax.report.figure_path import checked_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class _What(Recording):
    """Which of the loads.

    Attributes:
      domain: Which workload of several, by name; a pattern such as `*` plans all it names as one
        family, and judges each with `--evaluate`.
    """

    family: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _On:
    on: str = "cloudmatrix384"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Where(Target, _On):
    """The ranks of a machine, and the layer that is priced on them.

    Attributes:
      on: Machine: a name of the catalog, or a .toml file.
    """

    without_ranks: str = ""
    rank_cost: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _How(Search):
    """By which method, for which objective, and for how long.

    Attributes:
      start_from: The plan that is running (JSON), to be improved within --moves or
        within --migration-budget.
    """

    start_from: Path | None = None
    migration_budget: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Judging(Judging):
    """On what else the plan is judged, or which existing plan is.

    Attributes:
      evaluate: Judge this plan instead of making one: a file of cmjax, SGLang, vLLM, vLLM-Ascend
        (.json), TensorRT-LLM (.yaml) or OmniPlacement (.npy, .npz; `file.npz:name` for one of
        several).
    """

    evaluate: str | None = None
    test: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Output(Export):
    """Files; the table goes to the terminal.

    Attributes:
      json: Write the plan as JSON to this file; `-` is standard output.
      format: What `--json` writes: the plan with its evaluation, or the file that an engine loads.
      plot: Draw tokens per rank and layer, per method, to this .png or .svg.
      html: Write a page with the table and all pictures to this .html.
    """

    json: str | None = None
    plot: Path | None = None
    html: Path | None = None


_EVALUATED = {
    "domain", "windows", "first_layer", "ranks", "nodes", "model", "tokens", "on", "evaluate",
    "json", "plot", "html", "objective", "routing", "rank_cost",
}  # fmt: skip
"""Options that `--evaluate` heeds."""


@tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Decide where experts live: the slowest rank sets the MoE layer's time.

    Attributes:
      loads: .npy, .npz, .csv or .json of counts [layers, experts] or [windows, layers, experts] or
        of token-level routes, or a folder of them.
    """

    loads: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LOADS")]
    what: Annotated[_What, tyro.conf.arg(name="what to place")] = _What()
    where: _Where = _Where()
    how: Annotated[_How, tyro.conf.arg(name="how to search")] = _How()
    judging: Annotated[_Judging, tyro.conf.arg(name="how to judge")] = _Judging()
    output: _Output = _Output()

    def run(self, console: Console) -> None:
        output = self.output
        check_target(output.json, output.plot, output.html)
        if output.plot is not None:
            checked_path(output.plot)
        if output.html is not None:
            report.check_page(output.html)
        if self.judging.evaluate is not None:
            self._refuse_planning()
            self._evaluate(self.judging.evaluate, console)
            return
        with show_progress("placing", quiet=output.json == "-") as progress:
            placed = place_with(
                self.loads, self.where.on,
                self.what, self.where, self.how, self.judging, output, progress=progress,
            )  # fmt: skip
        if output.json not in (None, "-"):
            self._say_what_changed(placed, console)
        if output.plot:
            report.plot_placement(placed.tokens, output.plot)
        if output.html:
            report.PlacementPage.of(placed, self._routes(placed)).write(output.html)
        table = report.comparison_table(placed.scores, placed.objective)
        emit(console, output.json, placed.text(output.format), table)
        if self.how.shrink == "auto" and output.json != "-":
            console.print(f"{placed.method} is made for loads shrunk by {placed.shrink:g}")
        if output.json != "-":
            said = [placed.unknown] * (self.judging.test is None)
            way = placed.plan.provenance.get("way")
            said += [f"robust took: {way}"] * (way is not None)
            for line in filter(None, said):
                console.print(line, markup=False, highlight=False)
        if output.json not in (None, "-"):
            for line in placed.told(output.format, output.json):
                console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _say_what_changed(self, placed: Placement, console: Console) -> None:
        """What the file's format cannot hold, and what that costs."""
        plans = (placed.plan, placed.fit(self.output.format))
        changed = int((plans[0].expert_of_slot != plans[1].expert_of_slot).sum())
        if changed:
            before, after = (
                placement.evaluate(plan, placed.loads, placed.price).mean_par for plan in plans
            )
            console.print(
                f"vLLM-Ascend addresses one copy of an expert per rank: {changed} slots changed, "
                f"mean PAR {before:.4f} -> {after:.4f}"
            )

    def _routes(self, placed: Placement) -> placement.Routes | None:
        """Token-level routes for the page, where the recording has them."""
        if self.where.shared:
            return None
        try:
            return placement.read_routes(
                self.loads, experts=placed.price.experts, domain=self.what.domain
            )
        except ValueError:
            return None

    def _refuse_planning(self) -> None:
        """`--evaluate` makes no plan: options that say how to would be ignored."""
        for group in (self.where, self.what, self.how, self.judging, self.output):
            for field in dataclasses.fields(group):
                given = getattr(group, field.name) != field.default
                if given and field.name not in _EVALUATED:
                    raise ValueError(
                        f"--evaluate judges an existing plan and would ignore "
                        f"--{field.name.replace('_', '-')}"
                    )

    def _evaluate(self, path: str, console: Console) -> None:
        """Judge the plans of a file; each on every workload chosen."""
        what, where, output = self.what, self.where, self.output
        where.check_tokens()
        family = self._family()
        if output.html is not None and len(family) > 1:
            raise ValueError(f"--html shows one workload, {what.domain!r} names {len(family)}")
        plans = placement.read_plans(path, ranks=where.ranks, nodes=where.nodes)
        found = {
            (name, workload): evaluate(
                plan, loads, where.on,
                model=where.model, tokens=where.tokens, ranks=where.ranks, nodes=where.nodes,
                objective=self.how.objective, routing=where.routing, rank_cost=where.rank_cost,
                baselines=len(plans) == 1,
            )
            for name, plan in plans.items()
            for workload, loads in family.items()
        }  # fmt: skip
        scores = _titled({key: placed.scores for key, placed in found.items()})
        if output.plot or output.html:
            tokens = _titled({key: placed.tokens for key, placed in found.items()})
            if len({array.shape for array in tokens.values()}) > 1:
                raise ValueError(
                    f"{path}: the plans are for different ranks and cannot share a picture; "
                    f"choose one by file.npz:name"
                )
            if output.plot:
                report.plot_placement(tokens, output.plot)
            if output.html:
                page = report.PlacementPage.of(next(iter(found.values())))
                dataclasses.replace(page, tokens=tokens, scores=scores).write(output.html)
        result = {
            "machine": next(iter(found.values())).price.machine.name,
            "evaluation": {title: score.to_dict() for title, score in scores.items()},
        }
        table = report.placement_table(scores, self.how.objective)
        emit(console, output.json, result, table)

    def _family(self) -> dict[str, placement.Loads]:
        what = self.what
        if what.domain is None:
            family = {"": placement.read_loads(self.loads, windows=what.windows)}
        else:
            family = placement.read_family(self.loads, windows=what.windows, domain=what.domain)
        return {name: loads.numbered(what.first_layer) for name, loads in family.items()}


def _titled[Found](by_case: Mapping[tuple[str, str], Mapping[str, Found]]) -> dict[str, Found]:
    """What was found by plan and workload, under titles such as `greedy on law`."""
    titled = {}
    for (name, workload), found in by_case.items():
        for plan, value in found.items():
            plan = name or plan if plan == "plan" else plan
            titled[f"{plan} on {workload}" if workload else plan] = value
    return titled
