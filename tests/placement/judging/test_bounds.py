"""Bounds that no plan beats, checked against every plan of small problems."""

import itertools

import numpy as np
import pytest

from cmjax.placement import (
    Loads,
    Problem,
    Risk,
    lower_bound_objective_s,
    lower_bound_time_s,
    search,
)
from cmjax.placement.judging.compare import objective_s
from tests.placement.layer_time import slowest


def kinked(tokens):
    """Grows fast, then slowly: not convex."""
    top = tokens.max(-1)
    return 1e-5 + 1e-8 * np.minimum(top, 60) + 1e-10 * np.maximum(top - 60, 0)


def best_of_all(problem, price):
    """The best objective by enumeration of every plan of every layer, and all combinations."""
    times = [set() for _ in range(problem.layers)]
    slots = range(problem.slots)
    for extra in itertools.product(range(problem.experts), repeat=problem.redundant):
        held = [*range(problem.experts), *extra]
        for order in set(itertools.permutations(slots)) if problem.slots < 6 else _deals(problem):
            plan = problem.plan(np.tile([held[i] for i in order], (problem.layers, 1)))
            time_s = price(plan.tokens_per_rank(problem.loads.counts))
            for seen, time in zip(times, time_s.T, strict=True):
                seen.add(tuple(time.tolist()))
    return min(
        float(problem.objective(np.sum(together, axis=0))) for together in itertools.product(*times)
    )


def _deals(problem):
    """Orders of the slots that deal them to two ranks in every way."""
    half = problem.slots // 2
    for first in itertools.combinations(range(problem.slots), half):
        yield (*first, *(i for i in range(problem.slots) if i not in first))


@pytest.mark.parametrize("objective", ["mean", "worst", "cvar:0.5", "quantile:0.5"])
@pytest.mark.parametrize("price", [slowest, kinked])
@pytest.mark.parametrize(("layers", "seed"), [(1, 0), (1, 1), (1, 2), (2, 3)])
def test_no_plan_at_all_beats_the_bound(objective, price, layers, seed):
    rng = np.random.default_rng(seed)
    counts = rng.random((3, layers, 4)) ** 3 * 100
    problem = Problem(Loads(counts), 2, 2, objective=Risk.parse(objective))
    bound = lower_bound_objective_s(problem, price)
    assert bound <= best_of_all(problem, price) * (1 + 1e-9)
    apart = lower_bound_time_s(problem, price).sum(-1)
    assert bound >= problem.objective(apart) * (1 - 1e-12)


@pytest.mark.parametrize("objective", ["mean", "worst", "cvar:0.5"])
def test_windows_that_want_different_copies_raise_the_bound(objective):
    # Alone, each window would give its hot expert the two spare copies; together they cannot.
    counts = np.full((2, 1, 4), 10.0)
    counts[0, 0, 0] = counts[1, 0, 1] = 300
    problem = Problem(Loads(counts), 6, 2, objective=Risk.parse(objective))
    apart = problem.objective(lower_bound_time_s(problem, slowest).sum(-1))
    together = lower_bound_objective_s(problem, slowest)
    assert apart == pytest.approx(1e-5 + 100e-8)
    # Together each gets one: 150 in both windows. The program sees the price from below, and at 96
    # points between 100 and 300, evenly in the square root: here 200 · (2 · 48 + 1) / 95² apart.
    assert 1e-5 + 147.8e-8 < together <= 1e-5 + 150e-8 + 1e-15
    found = search(problem, slowest)
    assert together <= objective_s(found, problem, slowest) * (1 + 1e-9)


def test_the_linear_program_is_what_its_solution_by_hand_is():
    # Two windows, two hot experts of 120 and one spare copy: shares z and 1 - z of it. The mean of
    # the largest copies is 120 - 60 z and 120 - 60 (1 - z): 90 on average, whatever z.
    counts = np.array([[[120.0, 1, 1]], [[1.0, 120, 1]]])
    problem = Problem(Loads(counts), 4, 1)
    expected = 1e-5 + 90e-8
    assert lower_bound_objective_s(problem, slowest) == pytest.approx(expected, rel=2e-3)


def test_a_window_that_is_slow_in_all_layers_weighs_more_in_the_bound():
    # In both layers the first window wants the spare copy more: 120 and 60 tokens are its worst.
    counts = np.tile([[[120.0, 1, 1]], [[1.0, 60, 1]]], (1, 2, 1))
    problem = Problem(Loads(counts), 4, 1, objective=Risk("worst"))
    # By hand: z of the spare for the first expert in both layers gives 2 · (120 - 60 z) and
    # 2 · (60 - 30 (1 - z)), of which the slower is least at z = 1: 120. Equal weights give 105.
    bound = lower_bound_objective_s(problem, slowest)
    assert 2 * (1e-5 + 57e-8) < bound <= 2 * (1e-5 + 60e-8)


def test_dead_ranks_and_fewer_slots_are_known_to_the_bound():
    counts = np.array([[[90.0, 5, 5], [90.0, 5, 5]]])
    problem = Problem(Loads(counts), 4, 5, without_ranks=(3,), slots_by_layer=(1, 2))
    time_s = lower_bound_time_s(problem, lambda tokens: tokens.max(-1))
    np.testing.assert_allclose(time_s, [[90, 100 / 3]])
