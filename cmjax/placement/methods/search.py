"""Placement by search: simulated annealing by exact moves, from one starting plan or several.

What is returned is the best combination of the layers' plans found, by exact price and objective,
among those that the search (`local_search.py`) went through and the rules it is compared with: in
the windows it was made for it is never worse than any of these; by the mean, on no layer either.

Starting plans are copies that cover the largest load of any window, packed for all windows at once
(`rounding`), greedy replicate-and-pack on the objective's load (each expert's share of a window,
reduced over windows as the objective reduces time), and the covering copies in random slots. Where
the engine does not split evenly, copies that cover under its rule come first.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from cmjax.console import Progress
from cmjax.interrupt import Terminated
from cmjax.placement.methods.contiguous import contiguous
from cmjax.placement.methods.greedy import (
    cover,
    greedy,
    greedy_global,
    greedy_hierarchical,
    greedy_on,
    replicate,
)
from cmjax.placement.methods.incumbent import Incumbent
from cmjax.placement.methods.local_search import improve, start_state
from cmjax.placement.methods.once_per_rank import take_apart
from cmjax.placement.methods.one_spare import one_spare
from cmjax.placement.methods.rounding import round_places
from cmjax.placement.plan import EMPTY, count_copies
from cmjax.placement.pricing import LayerTime, noted
from cmjax.placement.problem import Plan, Problem
from cmjax.placement.rank_cost import even_level

_SMALL = 400_000  # windows times layers times experts, over all starting plans


@dataclass(frozen=True)
class SearchConfig:
    """How long the search runs.

    Attributes:
      starts: starting plans per layer: covering copies, with several windows greedy on the
        objective's load, and from then on covering copies in random slots. None is 1, and up to 6
        for problems so small that more cost little; a plan given to start from is one more.
      chunks: looks at the plans.
      rounds: rounds per chunk; a round is one change of copies and some swaps.
      swaps_per_slot: swaps of a round are this times the slots of a layer over all rounds.
      candidates: slots that each step compares with the hot rank's.
      theta: the penalty's θ.
      temperature: τ in the first and last round, falling geometrically from one to the other;
        under a limit of time the last is reached with it.
    """

    starts: int | None = None
    chunks: int = 16
    rounds: int = 60
    swaps_per_slot: float = 12.0
    candidates: int = 32
    theta: float = 0.85
    temperature: tuple[float, float] = (3.0, 0.1)

    def __post_init__(self):
        for name in ("starts", "chunks", "rounds", "candidates"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"SearchConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        if min(self.temperature) <= 0:
            raise ValueError(f"SearchConfig: temperature must be above 0, got {self.temperature}")


SHORT = SearchConfig(starts=1, chunks=2, rounds=24, swaps_per_slot=4.0)
"""For choices that compare many plans: a few seconds for 58 layers."""


def search(
    problem: Problem,
    layer_time_s: LayerTime,
    *,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
    config: SearchConfig | None = None,
    start: Plan | None = None,
) -> Plan:
    """Place experts to minimise the objective of the priced time of all layers.

    Args:
      problem: loads, ranks, slots and objective; every slot usable (`Problem.dense`).
      layer_time_s: the priced layer, see `pricing`.
      seed: of the starting plans and the moves. The same seed gives the same plan, unless `seconds`
        cut the run short.
      seconds: wall-clock limit. The first round, of the order of 1 / (chunks · rounds) of the whole
        and its compilation, is always made; no other is begun that would end too late.
      progress: told the chunks done, all chunks, and the objective so far.
      config: see `SearchConfig`.
      start: one more plan to start from, before the others.
    Returns: the best plan found; also on Ctrl-C, then the best so far.
    """
    config = config or SearchConfig()
    deadline = np.inf if seconds is None else time.monotonic() + seconds
    best = Incumbent(problem, layer_time_s)
    consider_rules(best)
    if start is not None:
        best.consider(start.expert_of_slot[None])
    try:
        count = config.starts or int(np.clip(_SMALL // problem.loads.counts.size, 1, 6))
        count += (start is not None) + (problem.routing != "even")
        plans = _starts(problem, start, count, np.random.default_rng(seed))
        best.consider(plans)
        improve_plans(best, plans, seed=seed, deadline=deadline, progress=progress, config=config)
    except Terminated:
        raise
    except KeyboardInterrupt:
        pass
    return problem.plan(best.expert_of_slot)


def improve_plans(
    best: Incumbent,
    plans: Int[np.ndarray, "plans layers slots"],
    *,
    seed: int = 0,
    deadline: float = np.inf,
    progress: Progress | None = None,
    config: SearchConfig,
) -> None:
    """Exact local search from given plans; what is better than `best` goes there.

    Args:
      best: holds the problem and its price.
      plans: where to start from.
      seed: of the moves.
      deadline: a time of `time.monotonic`. A round is begun only if it would end before, going by
        the slowest one so far; the first, which compiles, in any case.
      progress: told after each chunk.
      config: its `starts` does not count here.
    """
    if best.problem.ranks > 1:
        for chunk, found in enumerate(_chunks(best.problem, plans, seed, deadline, config), 1):
            best.consider(found)
            if progress is not None:
                progress(chunk, config.chunks, noted(best.objective_s))
    if progress is not None:
        progress(config.chunks, config.chunks, noted(best.objective_s))


def consider_rules(best: Incumbent) -> None:
    """Put the rules that a search is compared with into the contest."""
    for rule in (greedy, greedy_global, greedy_hierarchical, one_spare, contiguous):
        best.consider(rule(best.problem).expert_of_slot[None])


def relative_loads(problem: Problem) -> np.ndarray:
    """Tokens of every expert, [windows, layers, experts], over those of a rank where all ranks are
    equally busy: the mean, unless ranks cost unequally."""
    counts = problem.loads.counts
    even = even_level(problem.rank_cost, problem.ranks)
    return counts / counts.sum(-1, keepdims=True) * (problem.ranks / even)


def covering(problem: Problem) -> Int[np.ndarray, "plans layers slots"]:
    """Copies that cover the largest load of any window, packed for all windows: one plan, and where
    the engine does not split evenly a second, covering under its rule."""
    loads = relative_loads(problem)
    copied = replicate(loads.max(0), problem.copies, problem.most_copies)
    copies = count_copies(copied, problem.experts)
    plans = [pack_copies(problem, copies)]
    if problem.routing != "even":
        routed = cover(loads.max(0), problem.copies, problem.route.least_top_share(problem.ranks))
        near = problem.nodes if problem.routing == "nearest-copy" else 1
        plans.append(pack_copies(problem, routed, apart=near))
    return np.stack(plans)


def pack_copies(
    problem: Problem,
    copies: Int[np.ndarray, "rows experts"],
    wishes: jax.Array | None = None,
    *,
    wish: float = 0.01,
    apart: int = 1,
) -> Int[np.ndarray, "rows slots"]:
    """Whole copies on the problem's ranks, none twice on one; rows are layers, any times over.

    Args: as in `round_places`.
    """
    times = len(copies) // problem.layers
    loads = np.tile(relative_loads(problem).transpose(1, 0, 2), (times, 1, 1))
    spare = problem.slots - problem.copies
    if spare:  # an empty slot is a copy without load
        copies = np.pad(copies, ((0, 0), (0, 1)), constant_values=spare)
        loads = np.pad(loads, ((0, 0), (0, 0), (0, 1)))
        wishes = None if wishes is None else jnp.pad(wishes, ((0, 0), (0, 1), (0, 0)))
    found = round_places(copies, loads, problem.ranks, wishes, wish=wish, apart=apart)
    found = np.where(found == problem.experts, EMPTY, found)
    mean = np.tile(problem.loads.counts.mean(0), (times, 1))
    return take_apart(found, mean, problem.ranks, empty_too=problem.uneven)


def _starts(problem, start, count, rng) -> Int[np.ndarray, "plans layers slots"]:
    loads = relative_loads(problem)
    packed, *routed = covering(problem)
    own = greedy_on(problem, problem.objective(loads)).expert_of_slot
    plans = [*routed, packed] if len(loads) == 1 else [*routed, packed, own]
    if start is not None:
        plans.insert(0, start.expert_of_slot)
    mean = problem.loads.counts.mean(0)
    while len(plans) < count:
        drawn = rng.permuted(packed, axis=1)
        plans.append(take_apart(drawn, mean, problem.ranks, empty_too=problem.uneven))
    return np.stack(plans[:count])


def search_inputs(problem: Problem, plans: Int[np.ndarray, "plans layers slots"]):
    """Loads [rows, experts + 1, windows], experts [rows, ranks, size] and what a token costs on
    each rank, for `local_search`."""
    count, layers, _ = plans.shape
    loads = np.zeros((layers, problem.experts + 1, len(problem.loads.counts)), np.float32)
    loads[:, :-1] = relative_loads(problem).transpose(1, 2, 0)
    held = np.where(plans == EMPTY, problem.experts, plans)
    held = held.reshape(count * layers, problem.ranks, -1)
    cost = None if problem.rank_cost is None else jnp.asarray(problem.rank_cost, jnp.float32)
    return jnp.asarray(np.tile(loads, (count, 1, 1))), jnp.asarray(held, jnp.int32), cost


def _chunks(problem, plans, seed, deadline, config):
    """Plans [plans, layers, slots] after each chunk of the search, until the deadline."""
    rng = np.random.default_rng([seed, 1])
    count, layers, slots = plans.shape
    windows, ranks, experts = len(problem.loads.counts), problem.ranks, problem.experts
    loads, held, cost = search_inputs(problem, plans)
    route = None if problem.routing == "even" else problem.route
    state = start_state(held, loads, route=route, cost=cost)
    total = config.chunks * config.rounds
    swaps = int(np.ceil(config.swaps_per_slot * slots / total))
    objective = problem.objective
    first, last = config.temperature
    started = begin = time.monotonic()
    limit_s = max(deadline - started, 1e-9)
    slowest = -np.inf  # of a round; the first compiles and does not count
    for chunk in range(config.chunks):
        for at in range(chunk * config.rounds, (chunk + 1) * config.rounds):
            # Under a limit of time, as much of the way down as of the time.
            fall = min(max(at / total, (begin - started) / limit_s), 1.0)
            temperature = first * (last / first) ** fall
            chance = rng.standard_exponential((1, swaps + 1, windows, ranks), np.float32)
            state = jax.block_until_ready(improve(
                state,
                loads,
                jnp.full(1, config.theta, jnp.float32),
                jnp.asarray(temperature * rng.exponential(size=(1, swaps + 1)), jnp.float32),
                jnp.asarray(rng.integers(0, slots, (1, swaps + 1, config.candidates)), jnp.int32),
                jnp.asarray(chance + 1e-9),
                layers=layers,
                swaps=swaps,
                tail=objective.tail(windows),
                ignore_slower=objective.kind == "quantile",
                route=route,
                keep_empty=problem.uneven,
                cost=cost,
            ))  # fmt: skip
            now = time.monotonic()
            slowest = max(slowest, now - begin) if np.isfinite(slowest) else 0.0
            begin = now
            if now + slowest > deadline:
                break
        found = np.asarray(state.expert_of_slot).reshape(count, layers, slots)
        yield np.where(found == experts, EMPTY, found)
        if time.monotonic() + slowest > deadline:
            return
