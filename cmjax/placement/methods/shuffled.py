"""Random placement: contiguous copies in random slots, what a plan without knowledge is worth."""

import numpy as np

from cmjax.placement.methods.contiguous import contiguous
from cmjax.placement.methods.once_per_rank import take_apart
from cmjax.placement.problem import Plan, Problem


def shuffled(problem: Problem, *, seed: int = 0) -> Plan:
    """Place the copies of the contiguous plan in random slots, drawn for every layer."""
    rng = np.random.default_rng(seed)
    drawn = rng.permuted(contiguous(problem).expert_of_slot, axis=1)
    alike = np.ones((problem.layers, problem.experts))
    return problem.plan(take_apart(drawn, alike, problem.ranks, empty_too=problem.uneven))
