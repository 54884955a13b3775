"""How much of the differences between experts to expect again, found by leaving windows out.

A plan for loads nearer to even (`Loads.shrunk`) is worse where it was made and better where the
loads are others. By how much is seen on windows that a plan has not seen, as in cross-validation:

    S* = argmin over S of  sum over folds of  objective(time of the fold under the plan of the rest,
                                                        shrunk by S)

Folds are stretches of neighbouring windows: a later stretch of one recording, or, where windows are
workloads, another workload.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cmjax.console import Progress
from cmjax.placement.judging.compare import objective_s
from cmjax.placement.methods.search import SHORT, search
from cmjax.placement.pricing import LayerTime, noted
from cmjax.placement.problem import Problem

SHARES = (0.0, 0.2, 0.4, 0.7, 0.9)
"""Shares of the differences that may not recur."""


def choose_shrink(
    problem: Problem,
    layer_time_s: LayerTime,
    *,
    shares: Sequence[float] = SHARES,
    folds: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """The share of the differences between experts that serves windows left out best.

    Args:
      problem: what is placed; its windows are left out in turn.
      layer_time_s: the priced layer.
      shares: to choose from.
      folds: stretches of windows; fewer where there are fewer windows.
      seed: of the short searches that plan.
      progress: told after each search how many there were, how many there will be, and the time
        of the stretch that it was judged on.
    Returns: one of `shares`, of equal ones the first.
    Raises: ValueError for one window only, or fewer than two folds.
    """
    loads, counts = problem.loads, problem.loads.counts
    if len(counts) < 2 or folds < 2:
        raise ValueError(
            f"shrink auto leaves windows out in turn to see what recurs, which needs 2 or more "
            f"windows and folds, got {len(counts)} and {folds}: record more, count routes in "
            f"windows, join a family, or give the share itself"
        )
    windows = np.arange(len(counts))
    total_s = np.zeros(len(shares))
    stretches = np.array_split(windows, min(folds, len(windows)))
    for number, left_out in enumerate(stretches):
        seen = replace(loads, counts=np.delete(counts, left_out, axis=0))
        unseen = replace(problem, loads=replace(loads, counts=counts[left_out]))
        for at, share in enumerate(shares):
            part = replace(problem, loads=seen.shrunk(share))
            plan = search(part, layer_time_s, seed=seed, config=SHORT)
            found_s = objective_s(plan, unseen, layer_time_s)
            total_s[at] += len(left_out) * found_s
            if progress is not None:
                done = number * len(shares) + at + 1
                progress(done, len(stretches) * len(shares), noted(found_s))
    return float(shares[int(total_s.argmin())])
