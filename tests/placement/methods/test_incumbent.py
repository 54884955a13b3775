"""Which plan every layer takes, where the objective is one of all layers together."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.placement import Loads, Problem, Risk, contiguous, example_loads, greedy, shuffled
from cmjax.placement.judging.compare import objective_s
from cmjax.placement.methods.incumbent import Incumbent, choose
from tests.placement.layer_time import slowest


def value(measures, risk, choice):
    return risk(measures[choice, 0, :, np.arange(len(choice))].sum(0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["mean", "worst", "cvar:0.5", "quantile:0.5"]))
def test_no_start_and_no_change_of_one_layer_is_better(seed, objective):
    rng, risk = np.random.default_rng(seed), Risk.parse(objective)
    measures = rng.random((4, 1, 3, 5))
    starts = list(rng.integers(0, 4, (3, 5)))
    choice = choose(measures, risk, starts)
    found = value(measures, risk, choice)
    assert all(found <= value(measures, risk, start) * (1 + 1e-12) for start in starts)
    for layer, plan in itertools.product(range(5), range(4)):
        changed = choice.copy()
        changed[layer] = plan
        assert found <= value(measures, risk, changed) * (1 + 1e-12)
    if objective == "mean":
        np.testing.assert_array_equal(choice, measures[:, 0].mean(1).argmin(0))


def test_equal_times_are_decided_by_the_second_measure():
    measures = np.ones((3, 2, 2, 1))
    measures[:, 1] = np.array([3.0, 1, 2])[:, None, None]
    assert choose(measures, Risk("worst"), [np.array([0])]) == [1]


@pytest.mark.parametrize("objective", ["mean", "worst"])
def test_the_best_so_far_never_gets_worse_and_is_what_it_says(objective):
    loads = Loads(example_loads(windows=3, layers=4, experts=16).counts)
    problem = Problem(loads, 4, 4, objective=Risk.parse(objective))
    best, before = Incumbent(problem, slowest), np.inf
    assert best.objective_s == np.inf
    for plan in (contiguous(problem), shuffled(problem, seed=1), greedy(problem)):
        best.consider(plan.expert_of_slot[None])
        assert best.objective_s <= min(before, objective_s(plan, problem, slowest)) * (1 + 1e-12)
        before = best.objective_s
        found = problem.plan(best.expert_of_slot)
        assert objective_s(found, problem, slowest) == pytest.approx(before, rel=1e-12)
