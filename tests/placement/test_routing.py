"""Shares by rule equal those of tokens sent one source rank at a time."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.placement import (
    METHODS,
    ROUTINGS,
    Loads,
    Plan,
    Problem,
    Routing,
    evaluate,
    lower_bound_objective_s,
    lower_bound_tokens,
    place,
    step_par,
)
from cmjax.placement.methods.greedy import cover

SHAPES = [(4, 2), (6, 3), (6, 2), (8, 2), (8, 4), (6, 1)]


def slowest(tokens):
    return tokens.max(-1)


def sent(held, nodes, name, sources=None):
    """Every source rank in turn, as the engines' tables say."""
    ranks = len(held)
    size, copies = ranks // nodes, np.flatnonzero(held)
    sources = list(range(ranks)) if sources is None else sources
    share = np.zeros(ranks)
    for order, source in enumerate(sources):
        near = [copy for copy in copies if copy // size == source // size]
        if name == "rank-modulo":
            share[copies[order % len(copies)]] += 1
        elif name == "nearest-copy" and held[source]:
            share[source] += 1
        elif name == "nearest-copy" and near:
            share[near[0]] += 1
        else:
            share[copies] += 1 / len(copies)
    return share / len(sources)


def held_by(ranks):
    return [np.array(held) for held in itertools.product([False, True], repeat=ranks) if any(held)]


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(("ranks", "nodes"), SHAPES)
def test_shares_are_those_of_every_source_in_turn(name, ranks, nodes):
    routing, held = Routing(name, nodes), np.array(held_by(ranks))
    expected = np.array([sent(row, nodes, name) for row in held])
    np.testing.assert_allclose(routing(held), expected, atol=1e-12)
    np.testing.assert_allclose(routing(jnp.asarray(held)), expected, atol=1e-6)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(("ranks", "nodes"), SHAPES)
def test_the_least_share_of_the_busiest_copy_is_that_of_the_best_places(name, ranks, nodes):
    best = np.ones(ranks)
    for held in held_by(ranks):
        best[held.sum() - 1] = min(best[held.sum() - 1], sent(held, nodes, name).max())
    found = Routing(name, nodes).least_top_share(ranks)
    np.testing.assert_allclose(found, np.minimum.accumulate(best), atol=1e-12)


@pytest.mark.parametrize("name", ROUTINGS)
def test_tokens_of_a_plan_are_those_of_its_sources_dead_ranks_left_out(name):
    slots = np.array([[0, 1, -1, -1, 2, 0, 1, 3, -1, -1, 0, 2]])  # ranks 1 and 4 are dead
    plan = Plan(slots, 4, 6, nodes=2, routing=name)
    counts = np.array([[60.0, 30, 20, 10]])
    expected = np.zeros(6)
    for expert, tokens in enumerate(counts[0]):
        held = (slots.reshape(6, 2) == expert).any(-1)
        expected += tokens * sent(held, 2, name, sources=[0, 2, 3, 5])
    np.testing.assert_allclose(plan.tokens_per_rank(counts)[0], expected)
    np.testing.assert_allclose(plan.tokens_per_rank(counts).sum(), counts.sum())


def test_a_second_copy_on_a_rank_gets_nothing_where_engines_address_one():
    plan = Plan([[0, 0, 1, 0]], 2, 2, routing="rank-modulo")
    np.testing.assert_allclose(plan.split_of_slot, [[0.5, 0, 1, 0.5]])
    assert plan.doubles == 1


def test_an_unknown_routing_is_refused_with_those_that_are_known():
    for make in (
        lambda: Routing("nearest"),
        lambda: Plan([[0, 1]], 2, 2, routing="nearest"),
        lambda: Problem(Loads([[1, 2]]), 2, routing="nearest"),
    ):
        with pytest.raises(ValueError, match="one of even, nearest-copy, rank-modulo, got 'neares"):
            make()
    with pytest.raises(ValueError, match="equally many ranks alive on every node"):
        Problem(Loads(np.ones((1, 4))), 4, 4, 2, without_ranks=(0,), routing="nearest-copy")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_judged_by_the_rule_and_none_beats_its_bound(method, routing, family):
    problem = Problem(family, 8, 16, 2, routing=routing)
    plan = place(problem, method, slowest, seconds=0.0)
    assert plan.routing == routing and plan.doubles == 0
    score = evaluate(plan, family, slowest)
    assert (score.time_s >= lower_bound_tokens(problem).sum(-1) * (1 - 1e-9)).all()
    assert score.time_s.mean() >= lower_bound_objective_s(problem, slowest) * (1 - 1e-6)
    tokens = plan.tokens_per_rank(family.counts)
    np.testing.assert_allclose(score.par, tokens.max(-1) / tokens.mean(-1))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS[1:])
def test_a_search_that_knows_the_rule_beats_one_that_does_not(routing, family):
    told = Problem(family, 8, 8, 2, routing=routing)
    even = place(Problem(family, 8, 8, 2), "search", slowest).routed(routing)
    found = place(told, "search", slowest)
    assert evaluate(found, family, slowest).mean_par < evaluate(even, family, slowest).mean_par
    noise = [step_par(plan, family, 10_000).mean() for plan in (found, even)]
    assert noise[0] < noise[1]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_copies_that_cover_leave_the_least_load_of_a_copy(routing):
    share = Routing(routing, 2).least_top_share(4)
    loads = np.random.default_rng(0).random((5, 4))
    found = cover(loads, 9, share)
    assert (found.sum(-1) == 9).all() and found.min() >= 1
    every = [c for c in itertools.product(range(1, 5), repeat=4) if sum(c) == 9]
    best = np.min([(loads * share[np.array(c) - 1]).max(-1) for c in every], axis=0)
    np.testing.assert_allclose((loads * share[found - 1]).max(-1), best)
