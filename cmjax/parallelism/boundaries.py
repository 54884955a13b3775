"""Where stages begin: layers of every stage, so that a pipeline takes the fewest seconds.

    min  A max_s t_s(n_s) + B sum_s t_s(n_s)     over  sum_s n_s = n,  1 <= n_s

t_s(n) is what stage s takes with n layers, as little of them recomputed as fits. For every value
that the slowest stage may have, dynamic programming over stages finds the least sum; no value is
tried that could not be better than the best one yet. It is exact.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from cmjax.parallelism.layerwise import Counts

Best = Callable[[int, int], tuple[float, Counts | None]]
"""(stage, layers of each of its chunks) -> seconds at best, and what is then recomputed; `None` and
infinity where nothing fits."""
_EVENLY = 1e-6
"""Of a stage's seconds: what being uneven costs, so that of equal divisions the most even one is
taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waits:
    """How often a pipeline waits for its slowest stage, and how often for the sum of all."""

    slowest: float
    total: float

    def seconds(self, slowest: float, total: float) -> float:
        return self.slowest * slowest + self.total * total


def divisions(
    layers: int, stages: int, waits: Waits, best: Best, layer_s: float
) -> list[tuple[int, ...]]:
    """Layers of every stage: the fastest division with the fewest layers on the fullest stage, then
    those with more of them that are faster still.

    Args:
      layer_s: at least what a stage takes for each of its layers.
    Returns: none, if none fits.
    """
    least, found = math.inf, []
    for most in range(-(-layers // stages), layers - stages + 2):
        if waits.seconds(most * layer_s, layers * layer_s) >= least:
            break  # a stage that is as full takes too long
        few = max(1, layers - (stages - 1) * most)
        times = np.array(
            [[best(stage, n)[0] for n in range(few, most + 1)] for stage in range(stages)]
        )
        division = _fastest(times, layers - stages * few, waits)
        if division is not None:
            taken = times[np.arange(stages), division]
            seconds = waits.seconds(float(taken.max()), float(taken.sum()))
            if seconds < (1 - 1e-9) * least:
                least = seconds
                found.append(tuple(int(n) + few for n in division))
        if not np.isfinite(times[:, -1]).any():
            break  # no stage holds as many, nor more
    return found


def _fastest(times: np.ndarray, more: int, waits: Waits) -> np.ndarray | None:
    """Of `times` [stages, layers beyond the fewest], a column for every stage, `more` in all."""
    total = _least_sum(times, more, np.inf)
    if total is None:
        return None
    values = np.unique(times[np.isfinite(times)])
    values = values[values >= np.min(times, 1).max()]
    low, high = 0, len(values)
    while low < high:  # the least that the slowest stage can take
        middle = (low + high) // 2
        if _least_sum(times, more, values[middle]) is None:
            low = middle + 1
        else:
            high = middle
    least, best = math.inf, None
    for slowest in values[low:]:
        if waits.seconds(slowest, total[0]) >= least:
            break  # nor is any larger one better
        found = _least_sum(times, more, slowest)
        assert found is not None, "the slowest stage may take longer than it must"
        if waits.seconds(slowest, found[0]) < least:
            least, best = waits.seconds(slowest, found[0]), found[1]
    return best


def _least_sum(times: np.ndarray, more: int, slowest: float) -> tuple[float, np.ndarray] | None:
    """The least sum of a column for every stage, none of it slower than `slowest`, and which."""
    stages, width = times.shape
    fastest = np.min(times, 1).max()
    if not fastest <= min(slowest, np.finfo(float).max):
        return None
    costs = np.where(times <= slowest, times * (1 + _EVENLY * times / fastest), np.inf)
    sums = np.full(more + 1, np.inf)
    sums[0] = 0.0
    chosen = np.zeros((stages, more + 1), int)
    for stage in range(stages):
        options = np.full((width, more + 1), np.inf)
        for n in range(min(width, more + 1)):
            options[n, n:] = sums[: more + 1 - n] + costs[stage, n]
        chosen[stage] = np.argmin(options, 0)
        sums = options[chosen[stage], np.arange(more + 1)]
    if not np.isfinite(sums[more]):
        return None
    division, rest = np.zeros(stages, int), more
    for stage in reversed(range(stages)):
        division[stage] = chosen[stage, rest]
        rest -= division[stage]
    return float(times[np.arange(stages), division].sum()), division
