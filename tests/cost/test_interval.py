"""Intervals against Monte-Carlo."""

import numpy as np
import pytest

from cmjax.cost.interval import interval
from cmjax.hardware import Uncertainty, uncertainty


def test_an_interval_holds_nine_in_ten_of_what_constants_may_be():
    rng = np.random.default_rng(0)
    root = 0.05 * rng.normal(size=(3, 3))
    known = Uncertainty(("a", "b", "c"), root @ root.T)
    elasticity = np.array([0.7, -0.4, 0.2])
    logs = rng.multivariate_normal(np.zeros(3), known.covariance, 100_000)
    values = 50.0 * np.exp(logs @ elasticity)  # exact where the model is a power law
    found = interval(50.0, elasticity, known)
    inside = np.mean((values > found.low) & (values < found.high))
    assert inside == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / len(values)))
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_fitted_constants_are_surer_than_their_prior_and_share_a_covariance():
    known = uncertainty("cloudmatrix384")
    spread = dict(zip(known.keys, known.spread, strict=True))
    assert spread["exchange.dispatch_startup_s"] < 0.3 < 0.6
    assert spread["chip.hbm_bytes"] == 0.0 < spread["chip.hbm_bytes_per_s"]
    one, other = "exchange.dispatch_startup_s", "engines.cloudmatrix-infer.copy_s"
    i, j = known.keys.index(one), known.keys.index(other)
    assert known.covariance[i, j] < 0  # what one is slower by, the other is faster
