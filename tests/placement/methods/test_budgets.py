"""Redundant slots per layer under a limit of memory."""

import numpy as np
import pytest

from cmjax.placement import (
    Loads,
    Problem,
    Risk,
    choose_slots,
    place,
)
from cmjax.placement.judging.compare import objective_s
from cmjax.placement.plan import EMPTY
from tests.placement.layer_time import slowest


def test_slots_go_where_they_save_most(family):
    counts = np.array(family.counts)
    counts[:, 1] = 100.0  # a balanced layer needs no redundancy
    problem = Problem(Loads(counts), 8, 24)
    chosen = choose_slots(problem, slowest, 3 * 3 + 3)
    assert sum(chosen.usable) <= 12 and chosen.usable[1] == 3
    plan = place(chosen, "greedy", slowest)
    filled = (plan.expert_of_slot != EMPTY).reshape(3, 8, -1).sum(-1)
    np.testing.assert_array_equal(filled.max(-1), chosen.usable)
    other = place(Problem(Loads(counts), 8, 24, slots_by_layer=(3, 6, 3)), "greedy", slowest)
    assert objective_s(plan, problem, slowest) < objective_s(other, problem, slowest)
    with pytest.raises(ValueError, match="at least 9 are needed"):
        choose_slots(problem, slowest, 8)


@pytest.mark.slow
def test_chosen_budgets_beat_equal_ones_of_the_same_memory(family):
    counts = np.array(family.counts)
    counts[:, 1] = 100.0
    problem = Problem(Loads(counts), 24, 48, objective=Risk("worst"))
    chosen = choose_slots(problem, slowest, 3 * 2)
    equal = Problem(Loads(counts), 24, 48, objective=Risk("worst"), slots_by_layer=(2, 2, 2))
    assert sum(chosen.usable) <= sum(equal.usable)
    found, other = (
        objective_s(place(part, "search", slowest), part, slowest) for part in (chosen, equal)
    )
    assert found < 0.995 * other
