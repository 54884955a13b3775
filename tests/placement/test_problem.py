"""The problem refuses what cannot be placed; the plan accounts for every token."""

import numpy as np
import pytest

from cmjax.placement import Loads, Plan, Problem


def loads(experts=6, layers=2, windows=1):
    rng = np.random.default_rng(0)
    return Loads(rng.integers(1, 50, (windows, layers, experts)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 4, "redundant": 0}, "the nearest redundant that does is 2"),
        ({"ranks": 4, "redundant": 3}, "the nearest redundant that does is 2 or 6"),
        ({"ranks": 3, "nodes": 2}, "3 ranks do not divide over 2 nodes"),
        ({"ranks": 3, "redundant": -3}, "redundant must be 0 or more, got -3"),
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        ({"ranks": 3, "groups": 4}, "6 experts do not divide into 4 groups"),
    ],
)
def test_problems_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Problem(loads(), **arguments)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[0, 1, 2, 3]], "expert 4 of layer 0 has no slot"),
        ([[0, 1, 2, 3, 4, 5]], r"experts 0 to 4 .* found 5 in slot 5 of layer 0"),
        ([[0, 1, 2, 3, 4]], "5 slots do not divide over 2 ranks"),
        ([0, 1, 2, 3, 4, 0], r"\[layers, slots\]"),
        ([[0.0, 1, 2, 3, 4, 0]], "expected whole numbers"),
    ],
)
def test_plans_that_place_wrongly_are_refused(slots, message):
    with pytest.raises(ValueError, match=message):
        Plan(np.array(slots), 5, 2)


def test_tokens_per_rank_equal_a_loop_over_slots():
    rng = np.random.default_rng(1)
    counts = rng.random((3, 2, 6))
    slots = np.stack([rng.permutation([0, 1, 2, 3, 4, 5, 5, 5, 2]) for _ in range(2)])
    plan = Plan(slots, 6, 3)
    expected = np.zeros((3, 2, 3))
    for window, layer, slot in np.ndindex(3, 2, 9):
        expert = slots[layer, slot]
        copies = (slots[layer] == expert).sum()
        expected[window, layer, slot // 3] += counts[window, layer, expert] / copies
    np.testing.assert_allclose(plan.tokens_per_rank(counts), expected, rtol=1e-14)
    np.testing.assert_allclose(plan.tokens_per_rank(counts).sum(-1), counts.sum(-1))
    with pytest.raises(ValueError, match=r"expected counts of shape \[..., 2, 6\]"):
        plan.tokens_per_rank(counts[..., :5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without_ranks": (9,)}, "ranks 0 to 7, got 9"),
        ({"without_ranks": (0, 1, 2, 3, 4)}, "fewer than 24; redundant of at least 40 is needed"),
        ({"slots_by_layer": (4, 4)}, "3 numbers of at most 4"),
        ({"slots_by_layer": (4, 5, 4)}, "3 numbers of at most 4"),
    ],
)
def test_constraints_that_cannot_be_met_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Problem(Loads(np.ones((3, 24))), 8, 8, **arguments)
