"""`cmjax place`: where experts live."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from cmjax import placement, report
from cmjax.commands.evaluate_plan import evaluate_plans
from cmjax.commands.place_problem import (
    join_loads,
    parse_bytes,
    parse_ranks,
    parse_windows,
    same_model,
    weight_bytes,
)
from cmjax.commands.plan_output import (
    check_outputs,
    judged_score,
    numbered,
    plan_document,
    reach_of,
    score_of,
    write_page,
)
from cmjax.console import bar, check_target, emit
from cmjax.cost.ranks import mesh_spread
from cmjax.deploy.layer_price import row_time
from cmjax.deploy.moe_step import build_layer
from cmjax.deploy.step import MoEStep
from cmjax.hardware import Supernode, load_machine
from cmjax.placement.methods.search import OnStep

_EVALUATED = (
    "loads", "ranks", "nodes", "on", "model", "tokens", "windows", "json", "plot", "html",
    "evaluate", "domain", "first_layer",
)  # fmt: skip
"""Options that `--evaluate` heeds."""


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
    method: str = "search"
    """search, gradient, greedy, hierarchical, one-spare, contiguous or random."""
    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    model: str = "deepseek-r1"
    """Whose hidden and expert sizes the layer has; the number of experts is the file's."""
    tokens: int = 96
    """Tokens a rank routes per step; the counts are scaled to it."""
    windows: int = 1
    """Time windows to count token-level routes in."""
    seconds: float | None = None
    """Time limit of the search, besides compiling it; Ctrl-C ends it too, with the best so far."""
    seed: int = 0
    """Of the search."""
    json: str | None = None
    """Write the plan as JSON to this file; `-` is standard output."""
    plot: Path | None = None
    """Draw tokens per rank and layer, per method, to this .png or .svg."""
    html: Path | None = None
    """Write a page with the table and all pictures to this .html."""

    # What counts, and where it is judged.
    objective: str = "mean"
    """Of the time of all layers, over the windows: mean, worst, quantile:Q or cvar:Q."""
    shrink: float | Literal["auto"] = 0.0
    """How much of the differences between experts will not recur (0 to 1): the plan is made for
    loads so much nearer to even, as for texts unlike the recorded ones. `auto` leaves out windows
    in turn, or workloads of a family, and takes what serves them best."""
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
    """The plan that is running (JSON), to be improved within `--moves` or `--migration-budget`."""
    moves: int | None = None
    """Experts that may be sent to a rank that did not hold them, over all layers."""
    migration_budget: str | None = None
    """The same in bytes of the model's expert weights: 2GB, 512MiB."""
    multicast: bool = False
    """Price a dispatch kernel that sends a token to a rank once, whatever experts of its are there
    (a token's experts taken as independent)."""
    weighted: bool = False
    """Let the copies of an expert take uneven shares of its tokens where that is faster."""

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
        check_target(self.json, self.plot, self.html)
        if self.evaluate is not None:
            self._refuse_planning()
            self._evaluate(console)
            return
        placed = self.solve(quiet=self.json == "-")
        if self.plot:
            placed.draw(self.plot)
        machine = load_machine(self.on)
        loads = placed.loads
        document = plan_document(
            placed.plans[self.method], loads, self.format,
            provenance={"method": self.method, "machine": machine.name, "loads": loads.source,
                        "windows": loads.counts.shape[0], "seed": self.seed},
            console=None if self.json in (None, "-") else console,
            method=self.method,
            objective=self.objective,
            shrink=placed.shrink,
            machine=machine.name,
            evaluation={name: judged_score(found) for name, found in placed.judged.items()},
        )  # fmt: skip
        if self.html:
            nodes = self.nodes or mesh_spread(placed.plans[self.method].ranks, machine).nodes
            shown = {name: placed.plans[name] for name in placed.tokens}
            write_page(
                self.html, source=loads.source, loads=loads, tokens=placed.tokens,
                scores=placed.scores, machine=machine, model=self.model, nodes=self.nodes,
                reach=None if self.shared else reach_of(self.loads, self.domain, shown, nodes),
                served=placed.served,
            )  # fmt: skip
        emit(console, self.json, document, report.comparison_table(placed.judged, self.objective))
        if self.shrink == "auto" and self.json != "-":
            console.print(f"{self.method} is made for loads shrunk by {placed.shrink:g}")

    def _refuse_planning(self) -> None:
        """`--evaluate` makes no plan: options that say how to would be ignored."""
        given = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in _EVALUATED and getattr(self, field.name) != field.default
        ]
        if given:
            raise ValueError(
                f"--evaluate judges an existing plan and would ignore "
                f"--{given[0].replace('_', '-')}"
            )

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
            "evaluation": {name: score_of(score) for name, score in scores.items()},
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
        ranks = self._check()
        routes = None
        if loads is None:
            loads = placement.read_loads(self.loads, windows=self.windows, domain=self.domain)
            loads = numbered(loads, self.first_layer)
            routes = self._routes(loads.experts)
        full = not (self.weighted or self.without_ranks or self.memory_gib is not None)
        check_outputs(self.format, self.html, loads, full=full)
        for path in self.family:
            other = numbered(placement.read_loads(path, windows=self.windows), self.first_layer)
            loads = join_loads(loads, other)
        train, test = self._split(loads)
        layer = self._layer(machine, loads.experts, ranks)
        train, test = (
            None if part is None
            else placement.with_shared(part, self.shared, layer.copies).scaled(
                float(self.tokens) * ranks * (layer.copies + self.shared)
            )
            for part in (train, test)
        )  # fmt: skip
        assert train is not None
        seen = self._seen(routes)
        time_s = row_time(layer, machine, tokens=self.tokens, once_per_rank=self.multicast)
        problem = self._problem(train, time_s, machine, ranks)
        running = None if self.start_from is None else self._running(problem)
        moves = self._moves_allowed(machine, loads.experts, ranks)
        others = (self.method,) if running is None else ()
        methods = tuple(dict.fromkeys((*placement.BASELINES, *others)))
        shrink = self.shrink
        if shrink == "auto":
            with _progress(quiet) as on_step:
                shrink = placement.choose_shrink(problem, time_s, seed=self.seed, on_step=on_step)
        judging = {
            "test": test, "routes": seen[1], "seed": self.seed,
            "step_assignments": self.step_tokens * len(problem.alive) * layer.copies,
        }  # fmt: skip
        with _progress(quiet) as on_step:
            judged = placement.compare(
                problem, methods, time_s,
                weighted=self.weighted, shrink=shrink, group_by=seen[0],
                seconds=self.seconds, on_step=on_step, **judging,
            )  # fmt: skip
            if running is not None:
                begin = time.perf_counter()
                plan = placement.repair(
                    problem, running, time_s,
                    moves=moves, seed=self.seed, seconds=self.seconds, on_step=on_step,
                )  # fmt: skip
                solve_s = time.perf_counter() - begin
                bound_s = next(iter(judged.values())).bound_s
                for name, found, spent in (
                    ("running", running, 0.0), (self.method, plan, solve_s)
                ):  # fmt: skip
                    judged[name] = placement.judge_plan(
                        found, problem, time_s, bound_s, solve_s=spent, **judging
                    )
        return Placed(train, judged, self.method, shrink)

    def _check(self) -> int:
        """Refuse options that contradict each other; the ranks."""
        if self.ranks is None:
            raise ValueError("--ranks is needed to place experts")
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.seconds is not None and not self.seconds >= 0:
            raise ValueError(f"seconds must be 0 or more, got {self.seconds}")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ValueError(f"memory_gib must be positive, got {self.memory_gib}")
        if self.step_tokens < 0:
            raise ValueError(f"step_tokens must be 0 or more, got {self.step_tokens}")
        if not 0 <= self.shared <= self.redundant:
            raise ValueError(
                f"shared experts live in redundant slots: shared must lie in 0 to "
                f"{self.redundant}, got {self.shared}"
            )
        budgets = [self.moves, self.migration_budget]
        if self.start_from is None and budgets != [None, None]:
            raise ValueError("--moves and --migration-budget need --start-from PLAN")
        if self.start_from is not None and budgets.count(None) != 1:
            raise ValueError(
                "--start-from PLAN goes with one of --moves N and --migration-budget BYTES"
            )
        if self.moves is not None and self.moves < 0:
            raise ValueError(f"moves must be 0 or more, got {self.moves}")
        if self.test is not None and self.test_windows is not None:
            raise ValueError("--test and --test-windows: give one of them")
        if self.shrink != "auto" and not 0 <= self.shrink <= 1:
            raise ValueError(f"shrink must lie between 0 and 1, or be auto, got {self.shrink}")
        unlike = self.method != "search" or self.weighted or self.shrink
        if self.start_from is not None and unlike:
            raise ValueError(
                "--start-from is improved by the method search only, not --weighted or --shrink"
            )
        return self.ranks

    def _split(self, loads) -> tuple[placement.Loads, placement.Loads | None]:
        """What to plan on, and what to judge on."""
        train, test = loads, None
        if self.train_windows is not None:
            first, last = parse_windows(self.train_windows, len(loads.counts), "--train-windows")
            train = dataclasses.replace(loads, counts=loads.counts[first:last])
        if self.test_windows is not None:
            first, last = parse_windows(self.test_windows, len(loads.counts), "--test-windows")
            test = dataclasses.replace(loads, counts=loads.counts[first:last])
        if self.test is not None:
            test = numbered(placement.read_loads(self.test), self.first_layer)
            same_model(loads, test)
        return train, test

    def _routes(self, experts: int) -> placement.Routes | None:
        """Token-level routes, where nodes make them matter and the recording has them."""
        if self.shared or self.family or (self.nodes or 1) == 1:
            return None
        try:
            return placement.read_routes(self.loads, experts=experts, domain=self.domain)
        except ValueError:
            return None  # counts only: the loads were read

    def _seen(self, routes):
        """Routes of the windows to plan on, and of those to judge on."""
        if routes is None:
            return None, None
        first, last = parse_windows(self.train_windows or ":", self.windows, "--train-windows")
        train = routes.stretch(self.windows, first, last)
        if self.test_windows is None:
            return train, train
        first, last = parse_windows(self.test_windows, self.windows, "--test-windows")
        return train, routes.stretch(self.windows, first, last)

    def _layer(
        self, machine: Supernode, experts: int, ranks: int, redundant: int | None = None
    ) -> MoEStep:
        return build_layer(
            self.model, machine,
            ranks=ranks, nodes=self.nodes, experts=experts + self.shared,
            redundant=(self.redundant if redundant is None else redundant) - self.shared,
        )  # fmt: skip

    def _problem(self, loads, time_s, machine, ranks) -> placement.Problem:
        problem = placement.Problem(
            loads, ranks, self.redundant - self.shared, self.nodes or 1, self.groups,
            objective=placement.Risk.parse(self.objective),
            without_ranks=parse_ranks(self.without_ranks, "--without-ranks"),
        )  # fmt: skip
        if self.memory_gib is None:
            return problem
        slots = int(
            self.memory_gib * 2**30
            / self._expert_bytes(machine, loads.experts - self.shared, ranks)
        )  # fmt: skip
        return placement.choose_slots(problem, time_s, slots)

    def _running(self, problem) -> placement.Plan:
        """The plan that is running, with the layers of the loads."""
        read = placement.read_plan(str(self.start_from), ranks=self.ranks, nodes=self.nodes)
        return placement.align(read, problem.loads)[0]

    def _moves_allowed(self, machine, experts, ranks) -> int:
        """`--moves`, or as many experts as `--migration-budget` holds."""
        if self.migration_budget is None:
            return self.moves or 0
        return int(parse_bytes(self.migration_budget, "--migration-budget")
                   // self._expert_bytes(machine, experts, ranks))  # fmt: skip

    def _expert_bytes(self, machine, experts, ranks) -> float:
        """Weights of one expert of one layer: what a slot more adds to a rank."""
        small, large = (
            weight_bytes(self._layer(machine, experts, ranks, redundant))
            for redundant in (self.redundant, self.redundant + ranks)
        )
        return large - small


@dataclasses.dataclass(frozen=True)
class Placed:
    """Plans by method, how good each is, the method that was asked for, and its shrinkage."""

    loads: placement.Loads
    judged: dict[str, placement.Judged]
    method: str
    shrink: float

    @property
    def plans(self) -> dict[str, placement.Plan]:
        return {name: found.plan for name, found in self.judged.items()}

    @property
    def scores(self) -> dict[str, placement.Evaluation]:
        """How good each is under the loads it was made for."""
        return {name: found.made_for for name, found in self.judged.items()}

    @property
    def served(self) -> dict[str, placement.Evaluation]:
        """How good each is under loads it was not made for, where judged there."""
        return {
            name: found.served for name, found in self.judged.items() if found.served is not None
        }

    @property
    def tokens(self) -> dict[str, np.ndarray]:
        """Tokens per layer and rank of one window, for the plans worth a picture.

        Averaging windows would hide the imbalance.
        """
        last = self.loads.counts[-1]
        shown = ("contiguous", "greedy", "running", self.method)
        return {
            name: plan.tokens_per_rank(last) for name, plan in self.plans.items() if name in shown
        }

    def draw(self, path: Path) -> None:
        """A heat map of ranks by layers for each of `tokens`."""
        report.plot_placement(self.tokens, path)


@contextmanager
def _progress(quiet: bool) -> Iterator[OnStep]:
    with bar(quiet=quiet) as progress:
        task = progress.add_task("placing")

        def on_step(done: int, total: int, best_s: float) -> None:
            progress.update(task, total=total, completed=done, description=f"{best_s * 1e3:.3f} ms")

        yield on_step
