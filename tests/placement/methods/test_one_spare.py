"""OmniPlacement's rule: one spare slot per die, no expert twice on a die."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.placement import Loads, Problem, example_loads, greedy, one_spare
from cmjax.placement.plan import EMPTY


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 3), st.integers(0, 999))
def test_no_expert_is_twice_on_a_rank_and_the_spare_slot_is_the_limit(ranks, experts, more, seed):
    size = -(-experts // ranks) + more
    counts = np.random.default_rng(seed).random((1, 3, experts)) ** 4 + 1e-6
    plan = one_spare(Problem(Loads(counts), ranks, size * ranks - experts))
    for row in plan.expert_of_slot.reshape(-1, size):
        held = row[row != EMPTY].tolist()
        assert len(set(held)) == len(held) <= -(-experts // ranks) + 1
    assert plan.copies.max() <= 12


def test_uniqueness_costs_nothing_on_loads_like_the_recorded_ones():
    loads = example_loads(windows=1, layers=8)
    problem = Problem(loads, 32, 32)
    par = [
        (tokens.max(-1) / tokens.mean(-1)).mean()
        for tokens in (rule(problem).tokens_per_rank(loads.counts) for rule in (one_spare, greedy))
    ]
    assert par[0] < par[1] + 2e-3
