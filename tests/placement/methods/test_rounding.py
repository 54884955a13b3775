"""Rounding: whole copies, whole ranks, packed for all windows at once."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.placement.methods.rounding import round_copies, round_places
from cmjax.placement.plan import count_copies


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 20), st.integers(1, 6))
def test_whole_copies_fill_the_slots_and_are_the_nearest(seed, experts, redundant, most):
    spare = np.random.default_rng(seed).dirichlet(np.ones(experts), 3) * redundant
    slots = experts + redundant
    whole = round_copies(1 + spare, slots, most)
    assert (whole.sum(-1) == slots).all() and whole.min() >= 1
    assert whole.max() <= max(most, -(-slots // experts))
    if whole.max() < most:  # the cap binds nowhere: largest remainder
        assert (np.abs(whole - 1 - spare) < 1 + 1e-9).all()


def test_experts_hot_at_different_times_share_a_rank():
    # By any one load per expert these four are alike; only the windows tell who fits whom.
    loads = np.array([[[4.0, 4.0, 0.0, 0.0], [0.0, 0.0, 4.0, 4.0]]])
    placed = round_places(np.ones((1, 4), int), loads, 2)
    assert {frozenset(pair) for pair in placed.reshape(2, 2).tolist()} in (
        {frozenset((0, 2)), frozenset((1, 3))},
        {frozenset((0, 3)), frozenset((1, 2))},
    )


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(6, 4, 8), (5, 5, 10), (3, 2, 6)])
def test_every_copy_has_a_slot_and_no_rank_two_of_an_expert(experts, ranks, slots):
    rng = np.random.default_rng(0)
    loads = rng.random((4, 3, experts))
    copies = round_copies(1 + (slots - experts) * rng.dirichlet(np.ones(experts), 4), slots, ranks)
    placed = round_places(copies, loads, ranks)
    np.testing.assert_array_equal(count_copies(placed, experts), copies)
    for rank in placed.reshape(-1, slots // ranks):
        assert len(set(rank.tolist())) == len(rank)


def test_wishes_settle_ties():
    wishes = np.zeros((1, 4, 4), np.float32)
    wishes[0, np.arange(4), [2, 0, 3, 1]] = 1
    placed = round_places(np.ones((1, 4), int), np.ones((1, 1, 4)), 4, jnp.asarray(wishes))
    np.testing.assert_array_equal(placed, [[1, 3, 0, 2]])
