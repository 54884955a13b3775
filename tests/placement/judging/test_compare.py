"""Methods side by side."""

import numpy as np
import pytest

from cmjax.placement import (
    Loads,
    Problem,
    example_family,
    greedy,
)
from cmjax.placement.judging.compare import compare, objective_s


def slowest(tokens):
    return 1e-5 + 1e-8 * tokens.max(-1)


@pytest.fixture(scope="module")
def family():
    return Loads(example_family(workloads=4, layers=3, experts=24).counts)


def test_methods_are_compared_where_they_planned_and_where_not(family):
    train, test = Loads(family.counts[:2]), Loads(family.counts[2:])
    problem = Problem(train, 8, 8)
    found = compare(problem, ("greedy", "search"), slowest, test=test, step_assignments=512)
    for judged in found.values():
        assert judged.gap >= -1e-9 and judged.served.par.shape == (2, 3)
        assert judged.step_par.shape == (2, 3) and judged.reach is None
    assert found["search"].objective_s <= found["greedy"].objective_s


def test_a_shrunk_search_plans_for_less_and_is_judged_on_all(family):
    problem = Problem(family, 8, 8)
    plain, shrunk = (compare(problem, ("greedy", "search"), slowest, shrink=s) for s in (0.0, 1.0))
    np.testing.assert_array_equal(plain["greedy"].plan.experts, shrunk["greedy"].plan.experts)
    even = Problem(Loads(np.ones(family.counts.shape)), 8, 8)
    found = shrunk["search"]
    # Planned for even loads it is perfect on them, and no match for a plan made for the real ones.
    assert objective_s(found.plan, even, slowest) <= objective_s(greedy(even), even, slowest)
    assert found.objective_s == objective_s(found.plan, problem, slowest)
    assert plain["search"].objective_s < 0.9 * found.objective_s
