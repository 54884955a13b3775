"""The way that serves a domain left out best is taken, and of equals the simplest."""

import numpy as np
import pytest

from cmjax.placement import Loads, Problem, evaluate, place
from cmjax.placement.methods.robust import MARGIN, WAYS, held_out, simplest


def slowest(tokens):
    return tokens.max(-1)


def family(alike, *, domains=4, experts=32):
    rng = np.random.default_rng(0)
    common = 1.2 * rng.normal(size=(1, 3, experts))
    own = 1.2 * rng.normal(size=(domains, 3, experts))
    share = np.exp(common + 0 * own if alike else own)
    share = 1e6 * share / share.sum(-1, keepdims=True)
    return Loads(np.broadcast_to(share, own.shape), window_names=tuple("abcd"[:domains]))


def problem(loads):
    return Problem(loads, 8, 16)


def test_the_simplest_way_within_the_margin_is_taken():
    scores = np.array([[1.2, 1.2], [1 + MARGIN / 2, 1.0], [1.0, 1.0]])
    assert simplest(scores) == 1
    assert simplest(np.array([[1.2, 1.2], [1 + 4 * MARGIN, 1.0], [1.0, 1.0]])) == 2


def test_where_domains_are_alike_greedy_is_kept_as_nothing_gains_on_it():
    alike = problem(family(alike=True))
    scores = held_out(alike, slowest)
    names = [way.name for way in WAYS]
    assert scores[names.index("greedy")].mean() <= scores.min(0).mean() * (1 + MARGIN)
    assert scores[names.index("contiguous")].mean() > 1.1 * scores.min(0).mean()
    found = place(alike, "robust", slowest)
    assert found.provenance["way"] == "greedy"
    greedy = place(alike, "greedy", slowest)
    times = [evaluate(plan, alike.loads, slowest).mean_time_s for plan in (found, greedy)]
    assert times[0] == pytest.approx(times[1])


def test_where_domains_share_nothing_a_plan_is_not_made_to_measure():
    scores = held_out(problem(family(alike=False)), slowest)
    assert scores.shape == (len(WAYS), 4)
    names = [way.name for way in WAYS]
    taken = names[simplest(scores)]
    assert scores.mean(1)[names.index(taken)] <= scores.mean(1)[names.index("greedy")]
    assert taken != "greedy"


def test_one_domain_is_judged_on_draws_and_time_may_run_out():
    one = problem(family(alike=False, domains=1))
    assert held_out(one, slowest).shape == (len(WAYS), 1)
    assert len(held_out(one, slowest, seconds=0.0)) == 2
    told = []
    place(one, "robust", slowest, progress=lambda *step: told.append(step))
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_plan(seed):
    plans = [place(problem(family(alike=False)), "robust", slowest, seed=seed) for _ in range(2)]
    np.testing.assert_array_equal(*(plan.expert_of_slot for plan in plans))
