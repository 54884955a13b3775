"""Which layers get redundant slots, when memory does not allow the same for all.

A slot per rank more in layer l lowers its time (that of a short search, windows weighed as they
count with equal slots) from f[l, s] to f[l, s + 1]. Slots are whole, so the gradient is the
difference; slots go down the steepest:

    min sum over layers of f[l, s[l]]      sum over layers of s[l] <= total

solved on the convex hull of every f[l, ·] by taking its segments steepest first, which is exact
where f is convex and at most one segment from the optimum of the hull otherwise.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from cmjax.placement.methods.search import SHORT, search
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Problem


def choose_slots(problem: Problem, layer_time_s: LayerTime, total: int) -> Problem:
    """`problem` with `slots_by_layer` chosen so that all layers together use `total` per rank.

    Args:
      problem: with as many redundant slots as any layer may get.
      layer_time_s: the priced layer. It should not charge for the slots themselves.
      total: slots per rank that all layers may use together: memory over the size of an expert.
    Raises: ValueError if `total` does not hold every expert once.
    """
    alive = len(problem.alive)
    least = -(-problem.experts // alive)
    if total < least * problem.layers:
        raise ValueError(
            f"choose_slots: {total} slots per rank do not hold {problem.experts} experts of "
            f"{problem.layers} layers on {alive} ranks; at least {least * problem.layers} are "
            f"needed"
        )
    sizes = np.arange(least, problem.slots_per_rank + 1)
    by_window = np.stack([_predicted_s(problem, layer_time_s, int(size)) for size in sizes])
    equal = by_window[min(total // problem.layers, sizes[-1]) - least].sum(-1)
    time_s = np.tensordot(problem.objective.slope_at(equal), by_window, (0, 1))
    gains = [
        segment for layer in range(problem.layers) for segment in _segments(time_s[:, layer], layer)
    ]
    slots = np.full(problem.layers, least)
    left = total - least * problem.layers
    closed = set()
    for _, layer, steps in sorted(gains):
        # A segment that does not fit closes its layer: later segments build on it.
        if steps <= left and layer not in closed:
            slots[layer] += steps
            left -= steps
        else:
            closed.add(layer)
    return replace(problem, slots_by_layer=tuple(slots.tolist()))


def _predicted_s(problem, layer_time_s, size) -> Float[np.ndarray, "windows layers"]:
    alive = len(problem.alive)
    part = Problem(
        problem.loads, alive, size * alive - problem.experts,
        objective=problem.objective, rank_cost=problem.alive_cost,
    )  # fmt: skip
    plan = search(part, layer_time_s, config=SHORT)
    return price_s(layer_time_s, plan.tokens_per_rank(problem.loads.counts))


def _segments(time_s, layer):
    """Segments (slope, layer, slots) of the lower convex hull of a layer's time, where it falls."""
    at, found = 0, []
    while at + 1 < len(time_s):
        slopes = (time_s[at + 1 :] - time_s[at]) / np.arange(1, len(time_s) - at)
        step = int(slopes.argmin()) + 1
        if slopes[step - 1] >= 0:
            break
        found.append((float(slopes[step - 1]), layer, step))
        at += step
    return found
