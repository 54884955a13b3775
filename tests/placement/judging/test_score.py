"""What is reported about a plan, and the door to the methods."""

import numpy as np
import pytest

from cmjax.placement import (
    METHODS,
    Loads,
    Plan,
    Problem,
    evaluate,
    greedy,
    lower_bound_time_s,
    lower_bound_tokens,
    place,
    register_method,
)
from tests.placement.layer_time import slowest


def test_evaluation_agrees_with_arithmetic_by_hand():
    counts = np.array([[[30.0, 10, 20, 40]], [[40.0, 0, 20, 40]]])
    plan = Plan(np.array([[0, 1, 2, 3]]), 4, 2)  # ranks get 40 + 60, then 40 + 60
    found = evaluate(plan, Loads(counts), slowest)
    np.testing.assert_allclose(found.par, [[1.2], [1.2]])
    assert found.mean_par == pytest.approx(1.2)
    assert found.worst_par == pytest.approx(1.2)
    assert found.balancedness == pytest.approx(1 / 1.2)
    np.testing.assert_allclose(found.time_s, 1e-5 + 60e-8)
    np.testing.assert_allclose(found.lower_bound_s, 1e-5 + 50e-8)
    assert found.gap == pytest.approx((1e-5 + 60e-8) / (1e-5 + 50e-8) - 1)


def test_the_bound_is_the_hottest_copy_where_that_exceeds_the_mean():
    counts = np.array([[[90.0, 5, 5]]])
    assert lower_bound_tokens(Problem(Loads(counts), 3)) == 90
    assert lower_bound_tokens(Problem(Loads(counts), 3, 3)) == 100 / 3  # 4 copies of 22.5
    assert lower_bound_tokens(Problem(Loads(counts), 4, 1)) == 45


def test_the_bound_prices_every_rank_not_only_the_slowest():
    problem = Problem(Loads(np.array([[[90.0, 5, 5]]])), 3)
    total = lower_bound_time_s(problem, lambda t: (t**2).sum(-1))
    np.testing.assert_allclose(total, 90**2 + 5**2 + 5**2)


def test_a_plan_is_judged_on_loads_it_was_not_made_for():
    rng = np.random.default_rng(0)
    made_for, served = (Loads(rng.random((1, 2, 16)) ** 3 + 0.01) for _ in range(2))
    plan = greedy(Problem(made_for, 4, 4))
    assert evaluate(plan, served, slowest).mean_par > evaluate(plan, made_for, slowest).mean_par
    with pytest.raises(ValueError, match="expected counts of shape"):
        evaluate(plan, Loads(np.ones((2, 15))), slowest)


def test_place_goes_by_the_name_of_the_method():
    problem = Problem(Loads(np.random.default_rng(1).random((1, 2, 8)) + 0.1), 4, 4)
    assert set(METHODS) >= {"search", "greedy", "hierarchical", "one-spare", "contiguous", "random"}
    np.testing.assert_array_equal(
        place(problem, "greedy", slowest).expert_of_slot, greedy(problem).expert_of_slot
    )
    assert place(problem, "contiguous", slowest).expert_of_slot[0, 8] == 0
    plan = place(problem, "search", slowest, seconds=0.0)
    assert evaluate(plan, problem.loads, slowest).gap >= -1e-9


def test_an_unknown_method_is_answered_with_the_closest_names():
    problem = Problem(Loads(np.ones((1, 4))), 2)
    with pytest.raises(ValueError, match="unknown method 'gredy'; did you mean greedy"):
        place(problem, "gredy", slowest)
    with pytest.raises(ValueError, match="known methods: contiguous, gradient, greedy"):
        place(problem, "xyz", slowest)


def test_a_method_can_be_added_once():
    with pytest.raises(ValueError, match="'greedy' is already a placement method"):
        register_method("greedy")(METHODS["greedy"])
