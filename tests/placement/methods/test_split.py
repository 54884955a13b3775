"""Uneven shares of an expert's tokens per copy."""

import numpy as np

from cmjax.placement import (
    Loads,
    Problem,
    Risk,
    greedy,
    optimize_split,
)
from cmjax.placement.judging.compare import objective_s
from tests.placement.layer_time import slowest


def test_uneven_shares_help_where_copies_are_on_unequal_ranks(family):
    problem = Problem(family, 8, 8, objective=Risk("worst"))
    plan = greedy(problem)
    uneven = optimize_split(plan, problem, slowest)
    np.testing.assert_array_equal(uneven.expert_of_slot, plan.expert_of_slot)
    assert objective_s(uneven, problem, slowest) < objective_s(plan, problem, slowest)
    # By hand: 60 tokens on two copies beside 10 and 30 other tokens end at 50 on both.
    counts = np.array([[60.0, 10, 30]])
    tiny = Problem(Loads(counts), 2, 1)
    found = optimize_split(tiny.plan(np.array([[0, 1, 0, 2]])), tiny, slowest)
    np.testing.assert_allclose(found.tokens_per_rank(counts), [[50, 50]], rtol=1e-2)
