"""How much of what was recorded is expected again."""

import numpy as np
import pytest

from cmjax.placement import Loads, Problem, choose_shrink
from tests.placement.layer_time import slowest


def _windows(alike: bool) -> Loads:
    """Six windows of 2 layers and 24 experts: nearly the same hot experts in all, or others."""
    random = np.random.default_rng(0)
    hot = np.exp(random.normal(size=(2, 24)))
    if alike:
        return Loads(1000 * hot * np.exp(0.02 * random.normal(size=(6, 2, 24))))
    return Loads(np.stack([1000 * random.permuted(hot, axis=-1) for _ in range(6)]))


def test_loads_that_recur_are_planned_for_as_they_are():
    assert choose_shrink(Problem(_windows(alike=True), 8, 8), slowest) == 0.0


def test_loads_that_do_not_recur_are_planned_for_as_nearer_to_even():
    assert choose_shrink(Problem(_windows(alike=False), 8, 8), slowest) > 0


@pytest.mark.parametrize("windows, folds", [(1, 4), (6, 1)])
def test_nothing_can_be_left_out_of_one_window(windows, folds):
    problem = Problem(Loads(_windows(alike=True).counts[:windows]), 8, 8)
    with pytest.raises(ValueError, match=f"needs 2 or more windows and folds, got {windows} and"):
        choose_shrink(problem, slowest, folds=folds)
