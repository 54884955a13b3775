"""Placement by gradient: descent, rounding and the search that ends it."""

import numpy as np
import pytest

from cmjax.placement import (
    GradientConfig,
    Loads,
    Problem,
    Risk,
    example_family,
    gradient,
    greedy,
    greedy_hierarchical,
    one_spare,
    place,
    relax_and_round,
)
from cmjax.placement.judging.compare import objective_s
from tests.placement.layer_time import slowest

SHORT = GradientConfig(restarts=2, steps=20)


@pytest.fixture(scope="module")
def family():
    return Loads(example_family(workloads=5, layers=3, experts=32).counts)


@pytest.mark.parametrize("objective", ["mean", "worst"])
def test_relaxed_and_rounded_beats_greedy_on_many_workloads_without_any_search(family, objective):
    problem = Problem(family, 8, 8, objective=Risk.parse(objective))
    before = objective_s(greedy(problem), problem, slowest)
    for experts in relax_and_round(problem, slowest, config=GradientConfig(restarts=2)):
        assert objective_s(problem.plan(experts), problem, slowest) < before


def test_descent_lowers_the_relaxed_cost_of_a_random_start():
    problem = Problem(Loads(example_family(workloads=4, layers=2, experts=16).counts), 4)
    first, last = (
        np.mean([
            objective_s(problem.plan(experts), problem, slowest)
            for experts in relax_and_round(
                problem, slowest, config=GradientConfig(restarts=8, steps=steps, wish=100.0)
            )
        ])
        for steps in (1, 60)
    )  # fmt: skip
    assert last < 0.97 * first


def test_no_rule_is_better(family):
    problem = Problem(family, 8, 8, nodes=2, objective=Risk("worst"))
    found = objective_s(gradient(problem, slowest, config=SHORT), problem, slowest)
    for rule in (greedy, greedy_hierarchical, one_spare):
        assert found <= objective_s(rule(problem), problem, slowest) * (1 + 1e-12)


def test_the_same_seed_gives_the_same_plan_and_another_one_another(family):
    problem = Problem(family, 8, 8)
    one, two, other = (
        relax_and_round(problem, slowest, seed=seed, config=SHORT) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_a_price_that_is_flat_still_balances(family):
    problem = Problem(family, 8)
    plan = place(problem, "gradient", lambda tokens: 0 * tokens.max(-1) + 1e-5)
    par = [
        (tokens.max(-1) / tokens.mean(-1)).mean()
        for tokens in (p.tokens_per_rank(family.counts) for p in (plan, greedy(problem)))
    ]
    assert par[0] < par[1]


def test_a_price_that_jit_cannot_hash_is_taken(family):
    class Price:
        __hash__ = None

        def __call__(self, tokens):
            return slowest(tokens)

    problem = Problem(family, 8, 8)
    found = relax_and_round(problem, Price(), config=SHORT)
    np.testing.assert_array_equal(found, relax_and_round(problem, slowest, config=SHORT))


def test_one_rank_needs_no_relaxation():
    problem = Problem(Loads(np.ones((1, 2, 4))), 1)
    assert gradient(problem, slowest).ranks == 1


@pytest.mark.parametrize("name", ["restarts", "steps", "chunk"])
def test_a_config_that_does_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"GradientConfig: {name} must be at least 1, got 0"):
        GradientConfig(**{name: 0})
