"""Balance of sampled steps."""

import numpy as np
import pytest

from cmjax.placement import (
    Problem,
    evaluate,
    greedy,
    step_par,
)
from tests.placement.layer_time import slowest


def test_steps_of_few_tokens_are_less_balanced_than_totals(family):
    plan = greedy(Problem(family, 8, 8))
    par = evaluate(plan, family, slowest).par
    few, many = (step_par(plan, family, n, samples=8) for n in (64 * 8, 10**7))
    assert (few.mean() > par.mean() + 0.05).all()
    # Ten million assignments leave fluctuations of about a thousandth.
    np.testing.assert_allclose(many, par, rtol=5e-3)
    with pytest.raises(ValueError, match="at least 1"):
        step_par(plan, family, 0)
