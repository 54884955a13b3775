"""The relaxation: its price, its gradient, its rounding, and the search that ends it."""

import jax
import jax.numpy as jnp
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
from cmjax.placement.compare import objective_s
from cmjax.placement.gradient import project, relaxed_cost, soft_places

OBJECTIVES = ["mean", "worst", "cvar:0.6", "quantile:0.5"]
SHORT = GradientConfig(restarts=2, steps=20)


def slowest(tokens):
    return 1e-5 + 1e-8 * tokens.max(-1)


@pytest.fixture(scope="module")
def family():
    return Loads(example_family(workloads=5, layers=3, experts=32).counts)


def relaxed(seed=0, experts=6, ranks=3, windows=4):
    """θ, copies, loads of a small layer, in double precision."""
    rng = np.random.default_rng(seed)
    loads = rng.random((windows, experts)) ** 2 + 0.1
    loads *= ranks / loads.sum(-1, keepdims=True)
    copies = 1 + (9 - experts) * rng.dirichlet(np.ones(experts))
    return rng.normal(size=(experts, ranks)), copies, loads


def settled(theta, copies, sweeps=40):
    ranks = theta.shape[1]
    zero = jnp.zeros(len(copies)), jnp.zeros(ranks)
    return soft_places(theta, copies, copies.sum() / ranks, *zero, sweeps=sweeps)[0]


@pytest.mark.parametrize("seed", range(4))
def test_soft_places_meet_both_capacities_and_hold_an_expert_at_most_once(seed):
    with jax.enable_x64(True):
        theta, copies, _ = relaxed(seed)
        x = settled(jnp.asarray(4 * theta), jnp.asarray(copies))
        assert (x >= 0).all() and (x <= 1).all()
        np.testing.assert_allclose(x.sum(1), copies, rtol=1e-9)
        np.testing.assert_allclose(x.sum(0), 3.0, rtol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_through_the_price_agrees_with_central_differences(objective):
    with jax.enable_x64(True):
        theta, copies, loads = map(jnp.asarray, relaxed())
        unit = jnp.full(4, 700.0)
        x = settled(theta, copies)

        def cost(x, copies):
            return relaxed_cost(
                x, copies, loads, unit, 8.0, price=slowest, risk=Risk.parse(objective)
            )

        by_x, by_copies = jax.grad(cost, (0, 1))(x, copies)
        rng = np.random.default_rng(1)
        for _ in range(3):
            dx, dc = rng.normal(size=x.shape), rng.normal(size=copies.shape)
            step = 1e-5  # truncation 1e-10, rounding 1e-16 / 1e-5
            found = cost(x + step * dx, copies + step * dc) - cost(
                x - step * dx, copies - step * dc
            )
            expected = (by_x * dx).sum() + (by_copies * dc).sum()
            np.testing.assert_allclose(found / (2 * step), expected, rtol=1e-6, atol=1e-9)


def test_the_projected_gradient_is_that_of_the_whole_soft_assignment():
    with jax.enable_x64(True):
        theta, copies, loads = map(jnp.asarray, relaxed(2))

        def cost(x):
            return relaxed_cost(
                x, copies, loads, jnp.ones(4), 8.0, price=slowest, risk=Risk("worst")
            )

        x = settled(theta, copies)
        found = project(jax.grad(cost)(x), x, sweeps=200)
        for spot in [(0, 0), (3, 1), (5, 2)]:
            bump = jnp.zeros_like(theta).at[spot].set(1e-5)
            up, down = (cost(settled(theta + sign * bump, copies)) for sign in (1, -1))
            np.testing.assert_allclose(found[spot], (up - down) / 2e-5, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_decided_plan_costs_its_exact_price_when_sharp(objective):
    with jax.enable_x64(True):
        _, _, loads = relaxed(3, experts=6, ranks=3)
        x = np.zeros((6, 3))
        x[np.arange(6), [0, 0, 1, 1, 2, 2]] = 1
        top = (loads @ x).max(-1)
        found = relaxed_cost(
            jnp.asarray(x), jnp.ones(6), jnp.asarray(loads), jnp.ones(4), 1e5,
            price=lambda tokens: tokens.max(-1), risk=Risk.parse(objective),
        )  # fmt: skip
        # Price of the slowest rank, less a balanced one's, and the tie-break of a thousandth.
        expected = Risk.parse(objective)(1.001 * top - 1)
        np.testing.assert_allclose(found, expected, atol=2 * np.log(3) / 1e5)


@pytest.mark.parametrize("objective", OBJECTIVES)
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


def test_no_layer_is_worse_than_any_rule(family):
    problem = Problem(family, 8, 8, nodes=2, objective=Risk("worst"))
    plan = gradient(problem, slowest, config=SHORT)

    def by_layer(plan):
        return problem.objective(slowest(plan.tokens_per_rank(problem.loads.counts)))

    for rule in (greedy, greedy_hierarchical, one_spare):
        assert (by_layer(plan) <= by_layer(rule(problem)) * (1 + 1e-12)).all()


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


def test_one_rank_needs_no_relaxation():
    problem = Problem(Loads(np.ones((1, 2, 4))), 1)
    assert gradient(problem, slowest).ranks == 1


@pytest.mark.parametrize("name", ["restarts", "steps", "chunk"])
def test_a_config_that_does_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"GradientConfig: {name} must be at least 1, got 0"):
        GradientConfig(**{name: 0})
