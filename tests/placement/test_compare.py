"""Methods side by side."""

import pytest

from cmjax.placement import (
    Loads,
    Problem,
    example_family,
)
from cmjax.placement.compare import compare


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
