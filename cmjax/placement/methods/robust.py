"""Placement for texts that were not recorded: ways to plan, chosen by leaving out whole domains.

Ways, from the simplest: the contiguous plan; greedy on the mean load of the domains, as recorded
and shrunk; the search on shrunk loads with a window per domain. Each plans on all domains but one
and is judged on that one; with a single domain, on draws of the model of shift (`shift.predictive`)
instead, as nothing else is known. The simplest way is taken that is slower than the best by no more
than `MARGIN`: what a search fits beyond that is not there in the next domain.

Plans made for draws of the model as windows are not among the ways: on recorded domains they were
slower than greedy, as independent noise of every expert tells no copy where to go.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from cmjax.console import Progress
from cmjax.placement.loads import Loads
from cmjax.placement.methods.contiguous import contiguous
from cmjax.placement.methods.greedy import greedy_global
from cmjax.placement.methods.search import SHORT, search
from cmjax.placement.pricing import LayerTime, noted, price_s
from cmjax.placement.problem import Plan, Problem
from cmjax.placement.shift import by_domain, domain_of_window, predictive, without_domain

MARGIN = 0.005
"""What a less simple way has to gain."""
_FOLDS = 4  # domains left out at most
_FRESH = 16  # draws that a single domain is judged on

Make = Callable[[Problem, LayerTime, int], Plan]


@dataclass(frozen=True)
class Way:
    """A name, and what makes a plan of a problem and a price."""

    name: str
    make: Make


def _greedy(share):
    def make(problem, price, seed):
        return greedy_global(_shrunk(problem, share))

    return make


def _search_shrunk(share):
    def make(problem, price, seed):
        return search(_shrunk(problem, share), price, seed=seed, config=SHORT)

    return make


def _shrunk(problem, share):
    return replace(problem, loads=by_domain(problem.loads).shrunk(share))


WAYS = (
    Way("contiguous", lambda problem, price, seed: contiguous(problem)),
    Way("greedy", _greedy(0.0)),
    Way("greedy, shrunk 0.7", _greedy(0.7)),
    Way("search, shrunk 0.7", _search_shrunk(0.7)),
    Way("search, shrunk 0.4", _search_shrunk(0.4)),
)
"""From the simplest."""


def robust(
    problem: Problem,
    layer_time_s: LayerTime,
    *,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Place experts for a domain that was not recorded.

    Args:
      problem: its windows name their domains (`shift.domain_of_window`).
      layer_time_s: the priced layer.
      seed: of draws and searches.
      seconds: no way is tried any more after so long; those judged on all folds by then count.
      progress: told after each plan.
    Returns: the plan of the way chosen, `provenance` says which (`way`).
    """
    scores = held_out(problem, layer_time_s, seed=seed, seconds=seconds, progress=progress)
    way = WAYS[simplest(scores)]
    return replace(way.make(problem, layer_time_s, seed), provenance={"way": way.name})


def held_out(
    problem: Problem,
    layer_time_s: LayerTime,
    *,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Float[np.ndarray, "ways folds"]:
    """Seconds of what was left out under each way's plan of the rest; ways that time did not allow
    are missing at the end."""
    begin, found = time.monotonic(), []
    folds = _folds(problem, seed)
    for number, way in enumerate(WAYS):
        if seconds is not None and number > 1 and time.monotonic() - begin > seconds:
            break
        times = []
        for at, (seen, unseen) in enumerate(folds):
            plan = way.make(seen, layer_time_s, seed)
            tokens = plan.tokens_per_rank(unseen.counts)
            times.append(float(problem.objective(price_s(layer_time_s, tokens).sum(-1))))
            if progress is not None:
                done = number * len(folds) + at + 1
                progress(done, len(WAYS) * len(folds), noted(times[-1]))
        found.append(times)
    return np.array(found)


def simplest(scores: Float[np.ndarray, "ways folds"]) -> int:
    """The first way within the margin of the best, by the mean over folds of time over the fold's
    least."""
    relative = (scores / scores.min(0)).mean(1)
    return int(np.flatnonzero(relative <= relative.min() + MARGIN)[0])


def _folds(problem: Problem, seed: int) -> list[tuple[Problem, Loads]]:
    domains = int(domain_of_window(problem.loads).max()) + 1
    if domains == 1:
        fresh = predictive(problem.loads, _FRESH, seed=seed + 1)
        return [(problem, fresh)]
    chosen = np.arange(domains)
    if domains > _FOLDS:
        chosen = np.random.default_rng(seed).permutation(domains)[:_FOLDS]
    parts = [without_domain(problem.loads, int(domain)) for domain in chosen]
    return [(replace(problem, loads=seen), unseen) for seen, unseen in parts]
