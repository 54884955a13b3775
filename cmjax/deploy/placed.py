"""Where a model's experts live on a machine: `place` makes plans, `evaluate` judges one.

    placed = place("loads.npz", "cloudmatrix384", ranks=320, redundant=64)
    placed.plan.tokens_per_rank(counts)         # [..., layers, ranks]
    placed.save("plan.json", format="sglang")

A plan is judged by the priced time of the MoE layers on their slowest rank (`LayerPrice`).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cmjax import placement
from cmjax.console import Progress
from cmjax.deploy.layer_price import LayerPrice
from cmjax.deploy.place_options import Export, Judging, LoadsLike, Recording, Search, Target
from cmjax.deploy.placement_result import Placement
from cmjax.hardware import Supernode, as_machine
from cmjax.placement import Judge, Loads, Plan, Problem, Routes, Score


def place(
    loads: LoadsLike,
    machine: Supernode | str,
    *,
    ranks: int,
    redundant: int = Target.redundant,
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
    domain: str | None = Recording.domain,
    windows: int = Recording.windows,
    family: Sequence[LoadsLike] = Recording.family,
    train_windows: str | None = Recording.train_windows,
    first_layer: int | None = Recording.first_layer,
    test: LoadsLike | None = Judging.test,
    test_windows: str | None = Judging.test_windows,
    step_tokens: int = Judging.step_tokens,
    format: Literal["own", "sglang", "vllm-ascend"] = Export.format,
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
            memory_gib=memory_gib,
        ),
        Search(
            method=method, objective=objective, seconds=seconds, seed=seed, shrink=shrink,
            weighted=weighted, start_from=start_from, moves=moves,
            migration_budget=migration_budget,
        ),
        Judging(test=test, test_windows=test_windows, step_tokens=step_tokens),
        Export(format=format),
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
    search.check()
    judging.check()
    counted = as_loads(loads, recording)
    export_allows(export.format, counted, target, search)
    for path in recording.family:
        counted = counted.join(as_loads(path, replace(recording, domain=None)))
    routes = _routes(loads, recording, target, counted.experts)
    train, test = _split(counted, recording, judging)
    price = LayerPrice(
        target.model, machine,
        ranks=ranks, experts=counted.experts, redundant=target.redundant, nodes=target.nodes,
        tokens=target.tokens, shared=target.shared, multicast=target.multicast,
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
    plans[search.method] = replace(plans[search.method], provenance=provenance)
    return Placement(
        plans=plans, scores=scores, loads=problem.loads, price=price, method=search.method,
        objective=search.objective, shrink=float(shrink),
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
    baselines: bool = True,
) -> Placement:
    """Judge an existing plan on loads.

    Layers are matched by number where plan and loads have numbers, else by position, and each is
    priced with the slots it has.

    Args:
      plan: a plan, or a file of one in any known format (`cmjax.placement.read_plan`).
      loads, machine: as in `place`.
      model, tokens: what the MoE layer is priced for; tokens are per rank and step.
      ranks, nodes: where the file does not say them.
      domain, windows, first_layer: of loads that are read; see `Recording`.
      baselines: a plan of as many slots in every layer is joined by greedy and contiguous ones of
        its size, made for these loads.
    Returns: the plan as `plan`, its score, and those it is compared with.
    Raises: ValueError of one line for a file that is no plan, or a plan that is not for the loads.

    >>> import numpy as np
    >>> counts = np.random.default_rng(0).integers(1, 1000, size=(2, 16))
    >>> plan = place(counts, "cloudmatrix384", ranks=4, method="one-spare").plan
    >>> sorted(evaluate(plan, counts, "cloudmatrix384").scores)
    ['contiguous', 'greedy', 'plan']
    """
    Target(tokens=tokens).check_tokens()
    if not isinstance(plan, Plan):
        plan = placement.read_plan(plan, ranks=ranks, nodes=nodes)
    recording = Recording(domain=domain, windows=windows, first_layer=first_layer)
    part, counted = placement.align(plan, as_loads(loads, recording))
    price = LayerPrice(
        model, as_machine(machine),
        ranks=plan.ranks, experts=plan.experts, redundant=plan.slots - plan.experts,
        nodes=plan.nodes if plan.nodes > 1 else nodes, tokens=tokens,
    )  # fmt: skip
    served = price.scale(counted)
    plans: dict[str, Plan] = {"plan": part}
    scores: dict[str, Score] = {"plan": placement.evaluate_by_depth(part, served, price.with_slots)}
    if baselines and (plan.filled == plan.slots_per_rank).all():
        problem = Problem(served, plan.ranks, plan.slots - plan.experts, plan.nodes)
        for method in ("greedy", "contiguous"):
            plans[method] = placement.place(problem, method, price)
            scores[method] = placement.evaluate(plans[method], served, price)
    return Placement(plans=plans, scores=scores, loads=served, price=price, method="plan")


def export_allows(format: str, loads: Loads, target: Target, search: Search) -> None:
    """Before long work: can a plan for these loads be written in this format?

    Raises: ValueError of one line, saying what is missing.
    """
    full = not (search.weighted or target.without_ranks or target.memory_gib is not None)
    if format != Export.format and not full:
        raise ValueError(
            f"--format {format} holds neither empty slots nor shares per slot: do without "
            f"--without-ranks, --memory-gib and --weighted"
        )
    if format == "sglang" and loads.layer_labels is None:
        raise ValueError(
            f"{loads.source}: SGLang's file numbers layers as the model does, dense ones "
            f"included; give --first-layer (3 for DeepSeek-V3)"
        )


def as_loads(loads: LoadsLike, recording: Recording) -> Loads:
    """Loads as given or read, their layers numbered."""
    if isinstance(loads, str | Path):
        read = placement.read_loads(loads, windows=recording.windows, domain=recording.domain)
        return read.numbered(recording.first_layer)
    given = loads if isinstance(loads, Loads) else Loads(loads)
    return given.numbered(recording.first_layer)


def _split(loads: Loads, recording: Recording, judging: Judging) -> tuple[Loads, Loads | None]:
    """What to plan on, and what to judge on."""
    count = len(loads.counts)
    train, test = loads, None
    if recording.train_windows is not None:
        train = replace(loads, counts=loads.counts[recording.trained_on(count)])
    if judging.test_windows is not None:
        test = replace(loads, counts=loads.counts[judging.tested_on(count)])
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
    problem = Problem(
        loads, price.ranks, target.redundant - target.shared, target.nodes or 1, target.groups,
        objective=placement.Risk.parse(search.objective),
        without_ranks=target.dead_ranks,
    )  # fmt: skip
    if target.memory_gib is None:
        return problem
    slots = int(target.memory_gib * 2**30 / price.expert_bytes)
    return placement.choose_slots(problem, price, slots)


def _running(plan, target: Target, problem: Problem) -> Plan:
    """The plan that is running, with the layers of the loads."""
    if not isinstance(plan, Plan):
        plan = placement.read_plan(plan, ranks=target.ranks, nodes=target.nodes)
    return placement.align(plan, problem.loads)[0]
