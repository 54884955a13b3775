"""Doubles are taken apart, nothing else is lost, and the balance hardly suffers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.placement import Loads, Plan, Problem, greedy, once_per_rank


def doubles(plan):
    ordered = np.sort(plan.expert_of_slot.reshape(plan.layers, plan.ranks, -1), axis=-1)
    return int((ordered[..., 1:] == ordered[..., :-1]).sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.integers(2, 6), st.integers(2, 4))
def test_no_rank_holds_an_expert_twice_and_every_copy_is_kept(seed, ranks, size):
    rng = np.random.default_rng(seed)
    loads = Loads(rng.random((2, 3, ranks * size - ranks + 1)) ** 3 + 0.01)
    plan = greedy(Problem(loads, ranks, ranks - 1))
    found = once_per_rank(plan, loads)
    assert doubles(found) == 0
    np.testing.assert_array_equal(found.copies, plan.copies)
    changed = (found.expert_of_slot != plan.expert_of_slot).sum()
    assert changed <= 2 * doubles(plan)


def test_a_plan_without_doubles_stays_as_it_is():
    loads = Loads(np.arange(1.0, 9).reshape(1, 8))
    plan = greedy(Problem(loads, 4))
    np.testing.assert_array_equal(once_per_rank(plan, loads).expert_of_slot, plan.expert_of_slot)


def test_the_exchange_that_keeps_the_balance_is_taken():
    # Ranks have 21 and 41 tokens; expert 1, 2 or 3 for a copy of 0 leaves at most 49, 42 or 41.
    plan = Plan(np.array([[0, 0, 4, 1, 2, 3]]), 5, 2)
    found = once_per_rank(plan, Loads(np.array([[20.0, 2, 9, 30, 1]])))
    np.testing.assert_array_equal(found.expert_of_slot, [[0, 3, 4, 1, 2, 0]])


def test_more_copies_than_ranks_cannot_be_kept_apart():
    with pytest.raises(ValueError, match="expert 0 of layer 0 has 3 copies for 2 ranks"):
        once_per_rank(Plan(np.array([[0, 0, 0, 1]]), 2, 2), Loads(np.ones((1, 2))))
