"""Contiguous placement: what an engine does that was told nothing about the loads.

The rule: slot s holds expert s for s < experts; the redundant slots behind them hold experts
0, 1, 2, ... again, in order (slot s holds expert s mod experts). Slots are dealt to ranks in order.
"""

import numpy as np

from cmjax.placement.problem import Plan, Problem


def contiguous(problem: Problem) -> Plan:
    """Place experts in order, redundant slots holding the first experts' copies in order."""
    row = np.arange(problem.slots) % problem.experts
    return problem.plan(np.tile(row, (problem.layers, 1)))
