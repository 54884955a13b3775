"""Plans that hold together, and those that do not."""

import numpy as np
import pytest

from cmjax.placement import Plan


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"sum to 1, found 0\.9 for expert 0 of layer 0"):
        Plan(np.array([[0, 1, 0, 2]]), 3, 2, split=np.array([[0.5, 1, 0.4, 1]]))


def test_slots_that_a_selection_leaves_empty_are_dropped():
    # Layer 0 fills the first slot of rank 0 and the second of rank 1: one slot a rank.
    split = np.array([[1.0, 0, 0, 1], [1, 0.5, 0.5, 0]])
    plan = Plan(np.array([[1, -1, -1, 0], [0, 1, 1, -1]]), 2, 2, split=split)
    part = plan.select([0])
    assert part.expert_of_slot.tolist() == [[1, 0]] and part.split_of_slot.tolist() == [[1, 1]]
    np.testing.assert_array_equal(plan.select([1]).expert_of_slot, plan.expert_of_slot[[1]])
