"""The bound for two slots a rank, against every plan of small problems."""

import itertools

import numpy as np
import pytest

from studies.pairing_bound import pairing_bound, ranks_needed


def best_of_all(loads, ranks):
    """The smallest largest rank of any window, by enumeration of copies and pairs."""
    experts, best = loads.shape[1], np.inf
    for extra in itertools.combinations_with_replacement(range(experts), 2 * ranks - experts):
        held = np.array([*range(experts), *extra])
        weight = (loads / np.bincount(held))[:, held]
        best = min(best, _pair(weight, list(range(len(held)))))
    return best


def _pair(weight, left):
    if not left:
        return 0.0
    first, *rest = left
    return min(
        max(
            float((weight[:, first] + weight[:, other]).max()),
            _pair(weight, [slot for slot in rest if slot != other]),
        )
        for other in rest
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_at_all_beats_the_bound_and_some_come_near(seed):
    loads = np.random.default_rng(seed).random((3, 5)) ** 2
    loads *= 3 / loads.sum(1, keepdims=True)
    best = best_of_all(loads, 3)
    bound = pairing_bound(loads, 3, most=best, within=1e-3)
    assert 0.85 * best < bound <= best


def test_the_fewest_ranks_are_those_counted_by_hand():
    loads = np.array([[3.0, 3.0]])
    assert ranks_needed(loads, 6.0) == pytest.approx(1)
    # Too heavy to meet whole. Four fifths of each have one copy, the rest four of hardly any load,
    # taken as none: 8 / 5 heavy copies meet as many light ones. Whole numbers would take two ranks.
    assert ranks_needed(loads, 3.9) == pytest.approx(8 / 5)


def test_experts_hot_in_different_windows_may_share_a_rank():
    loads = np.array([[3.0, 0.5], [0.5, 3.0]])
    assert ranks_needed(loads, 3.5) == pytest.approx(1)
    # Then 2 / 3 of each have one copy and the rest two, 3 + 1 / 4 on a rank.
    assert ranks_needed(loads, 3.4) == pytest.approx(4 / 3)
