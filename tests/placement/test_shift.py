"""The model of shift: what domains differ by is found again, and one domain says nothing of it."""

from dataclasses import replace

import numpy as np
import pytest

from cmjax.placement import Loads, domain_of_window, predictive, without_domain
from cmjax.placement.shift import PRIOR_SPREAD, by_domain, spread


def family(domains, scale, *, between=1.0, experts=200, seed=0):
    rng = np.random.default_rng(seed)
    common = between * rng.normal(size=experts)
    share = np.exp(common + scale * rng.normal(size=(domains, 1, experts)))
    share /= share.sum(-1, keepdims=True)
    return Loads(1e6 * share, window_names=tuple(f"d{n}." for n in range(domains)))


def test_windows_are_of_one_domain_unless_they_are_named():
    loads = Loads(np.ones((4, 1, 3)))
    assert domain_of_window(loads).tolist() == [0, 0, 0, 0]
    named = replace(loads, window_names=("law 0", "law 1", "art", "code 7"))
    assert domain_of_window(named).tolist() == [0, 0, 1, 2]
    seen, unseen = without_domain(named, 0)
    assert seen.window_names == ("art", "code 7") and unseen.window_names == ("law 0", "law 1")


def test_windows_of_a_domain_count_as_one():
    counts = np.array([[[1.0, 3]], [[3, 1]], [[10, 10]]])
    found = by_domain(Loads(counts, window_names=("a 0", "a 1", "b")))
    np.testing.assert_allclose(found.counts, [[[2, 2]], [[2, 2]]])


@pytest.mark.parametrize("scale", [0.1, 0.4])
def test_the_spread_between_domains_is_found(scale):
    found = np.sqrt(np.square(spread(family(12, scale))).mean())
    # The floor under idle experts makes cold ones look more alike; the priors weigh a few domains.
    assert 0.7 * scale < found < 1.5 * scale


def test_one_domain_leaves_the_prior():
    loads = family(1, 0.4)
    kept = spread(loads)
    assert (kept >= PRIOR_SPREAD).all() and (kept <= PRIOR_SPREAD * np.sqrt(2)).all()


def test_draws_are_shares_whose_spread_is_that_of_the_model():
    loads = family(3, 0.3)
    drawn = predictive(loads, 400, seed=1)
    assert drawn.counts.shape == (400, 1, 200) and drawn.window_names is None
    np.testing.assert_allclose(drawn.counts.sum(-1), 1e6)
    found = np.log(drawn.counts).std(0)
    np.testing.assert_allclose(found.mean(), spread(loads).mean(), rtol=0.03)
    np.testing.assert_array_equal(predictive(loads, 400, seed=1).counts, drawn.counts)


def test_what_is_hot_by_chance_is_drawn_to_the_middle():
    chance = predictive(family(2, 0.8, between=0.0), 200)
    real = predictive(family(2, 0.1, between=0.8), 200)
    assert np.log(chance.counts).mean(0).std() < 0.6 * np.log(real.counts).mean(0).std()
