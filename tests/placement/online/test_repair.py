"""A running plan, improved within a budget of moves."""

import numpy as np
import pytest

from cmjax.placement import (
    Problem,
    Risk,
    count_moves,
    greedy,
    optimize_split,
    place,
    repair,
)
from cmjax.placement.judging.compare import objective_s
from tests.placement.layer_time import slowest


def test_repair_spends_no_more_moves_than_allowed_and_gains_with_each(family):
    problem = Problem(family, 8, 8, objective=Risk("worst"))
    current = place(problem, "contiguous", slowest)
    assert count_moves(current, current) == 0
    before, plans = objective_s(current, problem, slowest), []
    for moves in (0, 6, 40):
        plan = repair(problem, current, slowest, moves=moves)
        assert count_moves(plan, current) <= moves
        plans.append(objective_s(plan, problem, slowest))
    assert plans[0] == pytest.approx(before)
    assert plans[2] < plans[1] < 0.95 * before


def test_repair_places_the_experts_of_a_dead_rank_first(family):
    current = greedy(Problem(family, 8, 8))
    problem = Problem(family, 8, 8, without_ranks=(2,))
    need = sum(
        24 - len(set(np.delete(row.reshape(8, -1), 2, axis=0).ravel().tolist()))
        for row in current.expert_of_slot
    )
    plan = repair(problem, current, slowest, moves=need)
    assert not plan.alive[2] and count_moves(plan, current) == need > 0
    with pytest.raises(ValueError, match=f"at least {need} are needed"):
        repair(problem, current, slowest, moves=need - 1)


def test_repair_keeps_the_split_of_layers_it_does_not_touch(family):
    problem = Problem(family, 8, 8, objective=Risk("worst"))
    current = optimize_split(greedy(problem), problem, slowest)
    assert current.split is not None
    same = repair(problem, current, slowest, moves=0)
    np.testing.assert_array_equal(same.expert_of_slot, current.expert_of_slot)
    np.testing.assert_allclose(same.split_of_slot, current.split_of_slot)


@pytest.mark.parametrize("moves", [0, 20])
def test_repair_is_never_worse_than_the_running_plan_as_it_is_split(family, moves):
    problem = Problem(family, 8, 8, objective=Risk("worst"))
    current = optimize_split(place(problem, "search", slowest), problem, slowest)
    plan = repair(problem, current, slowest, moves=moves)
    before = objective_s(current, problem, slowest)
    assert objective_s(plan, problem, slowest) <= before * (1 + 1e-12)


def test_an_interrupted_repair_returns_what_its_steps_allow(family):
    problem = Problem(family, 8, 8)
    current = place(problem, "contiguous", slowest)

    def interrupt(done, total, note):
        if done == 5:
            raise KeyboardInterrupt

    plan = repair(problem, current, slowest, moves=50, progress=interrupt)
    assert objective_s(plan, problem, slowest) < objective_s(current, problem, slowest)


def test_repair_ends_in_time(family):
    problem = Problem(family, 8, 8)
    current, steps = place(problem, "contiguous", slowest), []
    repair(problem, current, slowest, moves=50, seconds=0.0, progress=lambda *s: steps.append(s))
    assert len(steps) == 1
