"""Methods side by side."""

import numpy as np

from cmjax.placement import (
    Loads,
    Problem,
    greedy,
)
from cmjax.placement.judging.compare import Judge, compare, objective_s
from tests.placement.layer_time import slowest


def test_methods_are_compared_where_they_planned_and_where_not(family):
    train, test = Loads(family.counts[:2]), Loads(family.counts[2:])
    problem = Problem(train, 8, 8)
    judge = Judge(problem, slowest, test=test, step_assignments=512)
    scores = compare(judge, ("greedy", "search")).scores
    for score in scores.values():
        assert score.objective_gap >= -1e-9 and score.test.par.shape == (2, 3)
        assert score.step_par.shape == (2, 3) and score.reach is None
    assert scores["search"].objective_s <= scores["greedy"].objective_s


def test_a_shrunk_search_plans_for_less_and_is_judged_on_all(family):
    problem = Problem(family, 8, 8)
    judge = Judge(problem, slowest)
    plain, shrunk = (compare(judge, ("greedy", "search"), shrink=s) for s in (0.0, 1.0))
    np.testing.assert_array_equal(
        plain.plans["greedy"].expert_of_slot, shrunk.plans["greedy"].expert_of_slot
    )
    even = Problem(Loads(np.ones(family.counts.shape)), 8, 8)
    plan, score = shrunk.plans["search"], shrunk.scores["search"]
    # Planned for even loads it is perfect on them, and no match for a plan made for the real ones.
    assert objective_s(plan, even, slowest) <= objective_s(greedy(even), even, slowest)
    assert score.objective_s == objective_s(plan, problem, slowest)
    assert plain.scores["search"].objective_s < 0.9 * score.objective_s
