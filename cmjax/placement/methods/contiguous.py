"""Contiguous placement: what an engine does that was told nothing about the loads.

The rule: slot s holds expert s for s < experts; the redundant slots behind them hold experts
0, 1, 2, ... again, in order (slot s holds expert s mod experts). Slots are dealt to ranks in order;
where they do not divide, the first ranks have one more (as vLLM deals experts).
"""

import numpy as np

from cmjax.placement.plan import EMPTY
from cmjax.placement.problem import Plan, Problem


def contiguous(problem: Problem) -> Plan:
    """Place experts in order, redundant slots holding the first experts' copies in order."""
    full = np.zeros((problem.ranks, problem.slots_per_rank), bool)
    full[:, :-1] = True
    full[: problem.ranks - (problem.slots - problem.copies), -1] = True
    row = np.full(problem.slots, EMPTY)
    row[full.ravel()] = np.arange(problem.copies) % problem.experts
    return problem.plan(np.tile(row, (problem.layers, 1)))
