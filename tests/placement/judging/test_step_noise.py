"""Balance of sampled steps."""

import numpy as np
import pytest

from cmjax.placement import (
    Loads,
    Problem,
    evaluate,
    example_family,
    greedy,
    step_par,
)


def slowest(tokens):
    return 1e-5 + 1e-8 * tokens.max(-1)


@pytest.fixture(scope="module")
def family():
    return Loads(example_family(workloads=4, layers=3, experts=24).counts)


def test_steps_of_few_tokens_are_less_balanced_than_totals(family):
    plan = greedy(Problem(family, 8, 8))
    par = evaluate(plan, family, slowest).par
    few, many = (step_par(plan, family, n, samples=8) for n in (64 * 8, 10**7))
    assert (few.mean() > par.mean() + 0.05).all()
    # Ten million assignments leave fluctuations of about a thousandth.
    np.testing.assert_allclose(many, par, rtol=5e-3)
    with pytest.raises(ValueError, match="at least 1"):
        step_par(plan, family, 0)
