"""Ranks that hold one expert more or less than others, and copies apart, by every method."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.placement import METHODS, Loads, Problem, contiguous, place
from cmjax.placement.methods.once_per_rank import take_apart


def slowest(tokens):
    return tokens.max(-1)


@pytest.mark.parametrize("method", METHODS)
def test_sixty_experts_on_eight_ranks_are_eight_or_seven_each(method):
    loads = Loads(np.random.default_rng(0).random((2, 3, 60)) ** 2 + 0.01)
    plan = place(Problem(loads, 8, uneven=True), method, slowest, seconds=0.0)
    assert set(plan.filled.ravel()) == {7, 8}
    assert (plan.copies == 1).all()


def test_experts_are_dealt_as_vllm_deals_them():
    plan = contiguous(Problem(Loads(np.ones((1, 5))), 3, uneven=True))
    np.testing.assert_array_equal(plan.expert_of_slot, [[0, 1, 2, 3, 4, -1]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nodes", [1, 2])
def test_no_rank_holds_an_expert_twice(method, nodes):
    counts = np.full((2, 2, 8), 40.0)
    counts[..., 0] = 600  # worth more copies than there are ranks
    plan = place(Problem(Loads(counts), 4, 8, nodes), method, slowest, seconds=0.0)
    assert plan.doubles == 0 and plan.copies.max() <= 4
    assert (plan.copies.sum(-1) == 16).all() or method == "one-spare"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_doubles_come_apart_wherever_copies_allow(seed, ranks, size, empty):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(size, ranks * size + 1))
    spare = int(rng.integers(0, min(ranks, ranks * size - experts) + 1)) if empty else 0
    row = list(range(experts)) + [-1] * spare
    copies = np.ones(experts, int)
    while len(row) < ranks * size:
        expert = int(rng.choice(np.flatnonzero(copies < ranks)))
        copies[expert] += 1
        row.append(expert)
    slots = rng.permuted(np.array([row]), axis=1)
    found = take_apart(slots, rng.random((1, experts)), ranks, empty_too=empty)
    np.testing.assert_array_equal(np.sort(found), np.sort(slots))
    for held in found.reshape(ranks, size):
        kept = held if empty else held[held >= 0]
        assert len(set(kept.tolist())) == len(kept)
