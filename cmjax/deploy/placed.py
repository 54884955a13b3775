"""Where a model's experts live on a machine: `place` makes plans, `evaluate` judges one.

    placed = place("loads.npz", "cloudmatrix384", ranks=320, redundant=64)
    placed.plan.tokens_per_rank(counts)         # [..., layers, ranks]
    placed.save("plan.json", format="sglang")

A plan is judged by the priced time of the MoE layers on their slowest rank (`LayerPrice`).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Literal

from cmjax import placement
from cmjax.console import Progress
from cmjax.cost.ranks import mesh_spread
from cmjax.deploy.layer_price import LayerPrice
from cmjax.deploy.place_options import (
    Export,
    FormatName,
    Judging,
    LoadsLike,
    Recording,
    Search,
    Target,
)
from cmjax.deploy.placement_result import ModelLayers, Placement
from cmjax.hardware import Supernode, as_machine
from cmjax.models.moe import load_config
from cmjax.placement import Judge, Loads, Plan, Problem, Routes, Score
from cmjax.placement.rank_cost import RankCost
from cmjax.placement.routing import RoutingName


def place(
    loads: LoadsLike,
    machine: Supernode | str,
    *,
    ranks: int,
    redundant: int | None = Target.redundant,
    uneven: bool = Target.uneven,
    nodes: int | None = Target.nodes,
    model: str = Target.model,
    tokens: int = Target.tokens,
    method: str = Search.method,
    objective: str = Search.objective,
    seconds: float | None = Search.seconds,
    seed: int = Search.seed,
    shrink: float | Literal["auto"] = Search.shrink,
    weighted: bool = Search.weighted,
    start_from: str | Path | Plan | None = Search.start_from,
    moves: int | None = Search.moves,
    migration_budget: str | float | None = Search.migration_budget,
    multicast: bool = Target.multicast,
    groups: int = Target.groups,
    shared: int = Target.shared,
    without_ranks: str | Sequence[int] = Target.without_ranks,
    memory_gib: float | None = Target.memory_gib,
    routing: RoutingName | None = Target.routing,
    rank_cost: RankCost | None = Target.rank_cost,
    domain: str | None = Recording.domain,
    windows: int = Recording.windows,
    family: Sequence[LoadsLike] = Recording.family,
    train_windows: str | None = Recording.train_windows,
    first_layer: int | None = Recording.first_layer,
    test: LoadsLike | None = Judging.test,
    test_windows: str | None = Judging.test_windows,
    step_tokens: int = Judging.step_tokens,
    format: FormatName = Export.format,
    model_layers: int | None = Export.model_layers,
    progress: Progress | None = None,
) -> Placement:
    """Decide where experts live, by the priced time of the MoE layer on its slowest rank.

    Args:
      loads: counts of tokens per expert, [layers, experts] or [windows, layers, experts], or a file
        or folder of counts or token-level routes.
      machine: where the layer is priced, or its name in the catalog, or a .toml file.
      ranks: expert-parallel ranks (dies).
      progress: told how far the search is (`cmjax.console.Progress`).
      format: a plan that this format cannot hold is refused before the search; see
        `Placement.save`.
      The others are the options of `cmjax place`, described at `cmjax.deploy.place_options`.
    Returns: the plan of `method` and those of the rules it is compared with, and their scores.
    Raises: ValueError of one line for loads that cannot be read, numbers that do not divide (it
      says what would), options out of their range or that contradict each other.

    >>> import numpy as np
    >>> counts = np.random.default_rng(0).integers(1, 1000, size=(2, 16))
    >>> placed = place(counts, "cloudmatrix384", ranks=4, redundant=4, method="greedy")
    >>> placed.plan
    Plan(2 layers of 16 experts, 20 slots on 4 ranks)
    >>> placed.scores["greedy"].mean_time_s < placed.scores["contiguous"].mean_time_s
    True
    """
    return place_with(
        loads,
        machine,
        Recording(
            domain=domain, windows=windows, family=family, train_windows=train_windows,
            first_layer=first_layer,
        ),
        Target(
            ranks=ranks, redundant=redundant, nodes=nodes, model=model, tokens=tokens,
            multicast=multicast, groups=groups, shared=shared, without_ranks=without_ranks,
            memory_gib=memory_gib, routing=routing, uneven=uneven, rank_cost=rank_cost,
        ),
        Search(
            method=method, objective=objective, seconds=seconds, seed=seed, shrink=shrink,
            weighted=weighted, start_from=start_from, moves=moves,
            migration_budget=migration_budget,
        ),
        Judging(test=test, test_windows=test_windows, step_tokens=step_tokens),
        Export(format=format, model_layers=model_layers),
        progress=progress,
    )  # fmt: skip


def place_with(
    loads: LoadsLike,
    machine: Supernode | str,
    recording: Recording,
    target: Target,
    search: Search,
    judging: Judging,
    export: Export,
    *,
    progress: Progress | None = None,
) -> Placement:
    """`place`, its options in the groups of `cmjax.deploy.place_options`."""
    machine = as_machine(machine)
    placement.check_method(search.method)
    ranks = target.check()
    for options in (recording, search, judging, export):
        options.check()
    counted = as_loads(loads, recording)
    target = replace(
        target, redundant=target.extra_slots(counted.experts),
        routing=target.routing or placement.routing_of(export.format),
    )  # fmt: skip
    export_allows(export, counted, target, search)
    for path in recording.family:
        counted = counted.join(as_loads(path, replace(recording, domain=None)))
    routes = _routes(loads, recording, target, counted.experts)
    train, test = _split(counted, recording, judging)
    price = LayerPrice(
        target.model, machine,
        ranks=ranks, experts=counted.experts, nodes=target.nodes, tokens=target.tokens,
        redundant=target.slots_per_rank(counted.experts) * ranks - counted.experts,
        shared=target.shared, multicast=target.multicast, unequal=target.rank_cost is not None,
    )  # fmt: skip
    train_routes, test_routes = _seen(routes, recording, judging)
    problem = _problem(price.scale(train), price, target, search)
    running = None if search.start_from is None else _running(search.start_from, target, problem)
    budget = search.moves_allowed(price.expert_bytes)
    shrink = search.shrink
    if shrink == "auto":
        shrink = placement.choose_shrink(problem, price, seed=search.seed, progress=progress)
    judge = Judge(
        problem, price,
        test=None if test is None else price.scale(test), routes=test_routes, seed=search.seed,
        step_assignments=judging.step_tokens * len(problem.alive) * price.copies,
    )  # fmt: skip
    others = (search.method,) if running is None else ()
    found = placement.compare(
        judge, tuple(dict.fromkeys((*placement.BASELINES, *others))),
        weighted=search.weighted, shrink=shrink, group_by=train_routes, seed=search.seed,
        seconds=search.seconds, progress=progress,
    )  # fmt: skip
    plans, scores = dict(found.plans), dict(found.scores)
    if running is not None:
        begin = time.perf_counter()
        repaired = placement.repair(
            problem, running, price,
            moves=budget, seed=search.seed, seconds=search.seconds, progress=progress,
        )  # fmt: skip
        solve_s = time.perf_counter() - begin
        for name, plan, spent in (("running", running, 0.0), (search.method, repaired, solve_s)):
            plans[name] = plan
            scores[name] = judge(plan, bound_s=found.objective_bound_s, solve_s=spent)
    provenance = {
        "method": search.method, "machine": machine.name, "loads": train.source,
        "windows": len(train.counts), "seed": search.seed,
    }  # fmt: skip
    made = plans[search.method]
    plans[search.method] = replace(made, provenance=provenance | dict(made.provenance))
    return Placement(
        plans=plans, scores=scores, loads=problem.loads, price=price, method=search.method,
        objective=search.objective, shrink=float(shrink),
        model_layers=_model_layers(export, target.model, counted),
    )  # fmt: skip


def evaluate(
    plan: Plan | str | Path,
    loads: LoadsLike,
    machine: Supernode | str,
    *,
    model: str = Target.model,
    tokens: int = Target.tokens,
    ranks: int | None = Target.ranks,
    nodes: int | None = Target.nodes,
    domain: str | None = Recording.domain,
    windows: int = Recording.windows,
    first_layer: int | None = Recording.first_layer,
    objective: str = Search.objective,
    routing: RoutingName | None = Target.routing,
    rank_cost: RankCost | None = Target.rank_cost,
    baselines: bool = True,
) -> Placement:
    """Judge an existing plan on loads.

    Layers are matched by number where plan and loads have numbers, else by position, and each is
    priced with the slots it has. A plan of an engine is judged as that engine routes, and where
    that is not an even split over copies, by an even split too.

    Args:
      plan: a plan, or a file of one in any known format (`cmjax.placement.read_plan`).
      loads, machine: as in `place`.
      model, tokens: what the MoE layer is priced for; tokens are per rank and step.
      ranks, nodes: where the file does not say them.
      domain, windows, first_layer: of loads that are read; see `Recording`.
      objective: of the time of all layers, over the windows, as in `place`.
      routing: how tokens choose among copies (default: as the plan's engine does).
      rank_cost: what a token costs on each rank, as in `place`.
      baselines: a plan of as many slots in every layer is joined by greedy and contiguous ones of
        its size, made for these loads.
    Returns: the plan as `plan`, its score, and those it is compared with; `plan, split evenly` is
      the same slots under an even split.
    Raises: ValueError of one line for a file that is no plan, or a plan that is not for the loads.

    >>> import numpy as np
    >>> counts = np.random.default_rng(0).integers(1, 1000, size=(2, 16))
    >>> plan = place(counts, "cloudmatrix384", ranks=4, method="one-spare").plan
    >>> sorted(evaluate(plan, counts, "cloudmatrix384").scores)
    ['contiguous', 'greedy', 'plan']
    """
    Target(tokens=tokens, ranks=ranks, nodes=nodes).check_tokens()
    Recording(windows=windows, first_layer=first_layer).check()
    risk = placement.Risk.parse(objective)
    if not isinstance(plan, Plan):
        plan = placement.read_plan(plan, ranks=ranks, nodes=nodes)
    plan = plan if routing is None else plan.routed(routing)
    cost = _cost(rank_cost, plan.ranks, plan.routing)
    plan = replace(plan, rank_cost=cost)
    machine = as_machine(machine)
    plan = plan if nodes is not None else on_nodes(plan, machine)
    recording = Recording(domain=domain, windows=windows, first_layer=first_layer)
    part, counted = placement.align(plan, as_loads(loads, recording))
    price = LayerPrice(
        model, machine,
        ranks=plan.ranks, experts=plan.experts, redundant=plan.slots - plan.experts,
        nodes=plan.nodes if plan.nodes > 1 else nodes, tokens=tokens, unequal=cost is not None,
    )  # fmt: skip
    served = price.scale(counted)
    plans: dict[str, Plan] = {"plan": part}
    if part.routing != "even" and part.split is None:
        plans["plan, split evenly"] = part.even()
    problem = None
    if (plan.filled == plan.slots_per_rank).all():
        problem = Problem(
            served, plan.ranks, plan.slots - plan.experts, plan.nodes,
            objective=risk, routing=part.routing, rank_cost=cost,
        )  # fmt: skip
        for method in ("greedy", "contiguous") if baselines else ():
            plans[method] = placement.place(problem, method, price)
    scores: dict[str, Score] = {}
    for name, found in plans.items():
        score = placement.evaluate_by_depth(found, served, price.with_slots)
        bound_s = float(risk(score.lower_bound_s))
        if problem is not None:
            routed = replace(problem, routing=found.routing)
            bound_s = placement.lower_bound_objective_s(routed, price)
        scores[name] = replace(
            score, objective_s=float(risk(score.time_s)), objective_bound_s=bound_s
        )
    return Placement(
        plans=plans, scores=scores, loads=served, price=price, method="plan", objective=objective
    )


def on_nodes(plan: Plan, machine: Supernode) -> Plan:
    """The plan on as few nodes of a machine as hold its ranks, where its routing asks for nodes and
    it knows of one only (an engine's file does not say)."""
    if plan.routing != "nearest-copy" or plan.nodes > 1:
        return plan
    return replace(plan, nodes=mesh_spread(plan.ranks, machine).nodes)


def export_allows(export: Export, loads: Loads, target: Target, search: Search) -> None:
    """Before long work: can a plan for these loads be written in this format?

    Raises: ValueError of one line, saying what is missing.
    """
    format, labels = export.format, loads.layer_labels
    full = not (search.weighted or target.without_ranks or target.memory_gib is not None)
    empty = target.uneven and (loads.experts + target.extra_slots(loads.experts)) % target.check()
    if format != Export.format and (not full or empty):
        raise ValueError(
            f"--format {format} holds neither empty slots nor shares per slot: do without "
            f"--without-ranks, --memory-gib, --uneven and --weighted"
        )
    if search.weighted and target.routing != "even":
        raise ValueError("--weighted makes shares of its own: it goes with --routing even")
    engine = placement.ENGINES.get(format)
    if engine is None:
        return
    if engine.numbered and labels is None:
        raise ValueError(
            f"{loads.source}: {engine.name}'s file numbers layers as the model does, dense ones "
            f"included; give --first-layer (3 for DeepSeek-V3)"
        )
    last = max(labels or (0,))
    if engine.numbered and export.model_layers is not None and export.model_layers <= last:
        raise ValueError(
            f"{loads.source}: layer {last} is recorded; model_layers must be above it, got "
            f"{export.model_layers}"
        )
    gap = next((one for one, two in pairwise(labels or ()) if two != one + 1), None)
    if not engine.numbered and gap is not None:
        raise ValueError(
            f"{loads.source}: {engine.name}'s file counts the MoE layers one by one, and layer "
            f"{gap + 1} is not recorded; record all layers"
        )


def _model_layers(export: Export, model: str, loads: Loads) -> ModelLayers | None:
    """The layers of the model, for files that go by their numbers; None where it is not known."""
    known = load_config(model)
    fits = known.routed_experts == loads.experts
    if export.model_layers is not None:
        return ModelLayers(export.model_layers, known.mtp_layers if fits else 0)
    labels = loads.layer_labels
    if not fits or labels is None or max(labels) >= known.layers:
        return None
    return ModelLayers(known.layers, known.mtp_layers)


def as_loads(loads: LoadsLike, recording: Recording) -> Loads:
    """Loads as given or read, their layers numbered."""
    if isinstance(loads, str | Path):
        of = {"windows": recording.windows, "domain": recording.domain}
        if not set("*?[") & set(recording.domain or ""):
            return placement.read_loads(loads, **of).numbered(recording.first_layer)
        family = placement.read_family(loads, **of)
        named = [
            replace(part, window_names=_named(name, part), source=str(loads))
            for name, part in family.items()
        ]
        joined = reduce(lambda one, two: one.join(two), named)
        return joined.numbered(recording.first_layer)
    given = loads if isinstance(loads, Loads) else Loads(loads)
    return given.numbered(recording.first_layer)


def _named(name: str, loads: Loads) -> tuple[str, ...]:
    """Names of the windows of a workload."""
    many = len(loads.counts) > 1
    return tuple(f"{name} {n}" if many else name for n in range(len(loads.counts)))


def _split(loads: Loads, recording: Recording, judging: Judging) -> tuple[Loads, Loads | None]:
    """What to plan on, and what to judge on."""
    count = len(loads.counts)
    train, test = loads, None
    if recording.train_windows is not None:
        train = loads.of_windows(recording.trained_on(count))
    if judging.test_windows is not None:
        test = loads.of_windows(judging.tested_on(count))
    if judging.test is not None:
        test = as_loads(judging.test, Recording(first_layer=recording.first_layer))
        loads.check_same_model(test)
    return train, test


def _routes(loads, recording: Recording, target: Target, experts: int) -> Routes | None:
    """Token-level routes, where nodes make them matter and the recording has them."""
    read = isinstance(loads, str | Path)
    if not read or target.shared or recording.family or (target.nodes or 1) == 1:
        return None
    try:
        return placement.read_routes(loads, experts=experts, domain=recording.domain)
    except ValueError:
        return None  # counts only: the loads were read


def _seen(routes: Routes | None, recording: Recording, judging: Judging):
    """Routes of the windows to plan on, and of those to judge on."""
    if routes is None:
        return None, None
    count = recording.windows
    chosen = recording.trained_on(count)
    train = routes.stretch(count, chosen.start, chosen.stop)
    if judging.test_windows is None:
        return train, train
    chosen = judging.tested_on(count)
    return train, routes.stretch(count, chosen.start, chosen.stop)


def _problem(loads: Loads, price: LayerPrice, target: Target, search: Search) -> Problem:
    routing = target.routing or "even"
    nodes = price.spread if routing == "nearest-copy" else 1
    problem = Problem(
        loads, price.ranks, (target.redundant or 0) - target.shared, target.nodes or nodes,
        target.groups,
        objective=placement.Risk.parse(search.objective),
        without_ranks=target.dead_ranks, routing=routing, uneven=target.uneven,
        rank_cost=_cost(target.rank_cost, price.ranks, routing),
    )  # fmt: skip
    if target.memory_gib is None:
        return problem
    slots = int(target.memory_gib * 2**30 / price.expert_bytes)
    return placement.choose_slots(problem, price, slots)


def _cost(given: RankCost | None, ranks: int, routing: str) -> tuple[float, ...] | None:
    return None if given is None else placement.rank_cost(given, ranks, routing=routing)


def _running(plan, target: Target, problem: Problem) -> Plan:
    """The plan that is running, with the layers of the loads."""
    if not isinstance(plan, Plan):
        plan = placement.read_plan(plan, ranks=target.ranks, nodes=target.nodes)
    plan = replace(plan, rank_cost=problem.rank_cost)
    if problem.routing != "even":
        plan = replace(plan, nodes=problem.nodes, routing=problem.routing)
    return placement.align(plan, problem.loads)[0]
