"""The best plan so far: for every layer one of the plans seen, chosen together.

An objective of the summed time couples layers: which plan is best for a layer depends on which
windows are slow in the others. The choice is made by descent, from the last one and from every new
plan as a whole: layer after layer takes the plan with which the whole is best, until none changes.
For the mean this is the best plan of every layer.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from cmjax.placement.plan import EMPTY
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Problem
from cmjax.placement.risk import Risk

_EQUAL = 1e-12

Choice = Int[np.ndarray, "layers"]


class Incumbent:
    """The best plan so far, by exact price in double precision.

    Where prices are equal, as where another resource than the slowest rank sets them, the plan with
    the smaller largest rank wins.
    """

    def __init__(self, problem: Problem, layer_time_s: LayerTime):
        self.problem, self._layer_time_s = problem, layer_time_s
        self._plans = np.empty((0, problem.layers, problem.slots), np.int32)
        # Seconds, and the slowest rank over the mean.
        self._measures = np.empty((0, 2, len(problem.loads.counts), problem.layers))
        self._choice: Choice | None = None

    def consider(self, plans: Int[np.ndarray, "plans layers slots"]) -> None:
        """Take plans into the choice."""
        layers, known = self.problem.layers, len(self._plans)
        self._plans = np.concatenate([self._plans, plans])
        self._measures = np.concatenate([self._measures, [self._measure(p) for p in plans]])
        starts = [np.full(layers, plan) for plan in range(known, len(self._plans))]
        if self._choice is not None:
            starts.insert(0, self._choice)
        self._choice = choose(self._measures, self.problem.objective, starts)

    @property
    def expert_of_slot(self) -> Int[np.ndarray, "layers slots"]:
        """Expert of every slot; empty slots before anything was considered."""
        if self._choice is None:
            return np.full((self.problem.layers, self.problem.slots), EMPTY, np.int32)
        return self._plans[self._choice, np.arange(self.problem.layers)]

    @property
    def objective_s(self) -> float:
        """Its objective."""
        if self._choice is None:
            return np.inf
        return float(_score(self._measures, self.problem.objective, self._choice)[0])

    def _measure(self, experts):
        tokens = self.problem.plan(experts).tokens_per_rank(self.problem.loads.counts)
        return np.stack([price_s(self._layer_time_s, tokens), tokens.max(-1) / tokens.mean(-1)])


def choose(
    measures: Float[np.ndarray, "plans measures windows layers"],
    risk: Risk,
    starts: Iterable[Choice],
) -> Choice:
    """A plan for every layer.

    Args:
      measures: one cost of every plan, by window and layer, or two: where sums of the first are
        equal by `risk`, the second decides.
      risk: of the windows.
      starts: choices to descend from.
    Returns: the best choice found; none of `starts` is better.
    """
    ends = [_descend(measures, risk, start) for start in starts]
    best = ends[0]
    for end in ends[1:]:
        if _less(_score(measures, risk, end), _score(measures, risk, best)):
            best = end
    return best


def _descend(measures, risk, start):
    choice, changed = start.copy(), True
    while changed:
        changed = False
        total = _total(measures, choice)
        for layer, current in enumerate(choice):
            rest = total - measures[current, :, :, layer]
            scores = risk((rest + measures[..., layer]).transpose(2, 1, 0))  # [measures, plans]
            equal = scores[0] <= scores[0].min() * (1 + _EQUAL)
            best = np.where(equal, scores[-1], np.inf).argmin()
            if _less(scores[:, best], scores[:, current]):
                choice[layer], changed = best, True
                total = rest + measures[best, :, :, layer]
    return choice


def _total(measures, choice):
    return measures[choice, :, :, np.arange(len(choice))].sum(0)


def _score(measures, risk, choice):
    return risk(_total(measures, choice).T)


def _less(one, other):
    """Whether scores are less: by the second where the first are equal."""
    differ = np.abs(one - other) > _EQUAL * np.abs(other)
    return bool(differ.any()) and bool(one[differ.argmax()] < other[differ.argmax()])
