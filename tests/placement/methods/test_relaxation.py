"""The relaxation of a layer: its capacities, its price, and the gradient of that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.placement import Risk
from cmjax.placement.methods.relaxation import project, relaxed_cost, soft_places
from tests.placement.layer_time import slowest

OBJECTIVES = ["mean", "worst", "cvar:0.6", "quantile:0.5"]


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
            by_window = relaxed_cost(x, copies, loads, unit, 8.0, price=slowest)
            return Risk.parse(objective).slope(by_window, 8.0) @ by_window

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
            by_window = relaxed_cost(x, copies, loads, jnp.ones(4), 8.0, price=slowest)
            return Risk("worst").slope(by_window, 8.0) @ by_window

        x = settled(theta, copies)
        found = project(jax.grad(cost)(x), x, sweeps=200)
        for spot in [(0, 0), (3, 1), (5, 2)]:
            bump = jnp.zeros_like(theta).at[spot].set(1e-5)
            up, down = (cost(settled(theta + sign * bump, copies)) for sign in (1, -1))
            np.testing.assert_allclose(found[spot], (up - down) / 2e-5, rtol=1e-5, atol=1e-9)


def test_a_decided_plan_costs_its_exact_price_when_sharp():
    with jax.enable_x64(True):
        _, _, loads = relaxed(3, experts=6, ranks=3)
        x = np.zeros((6, 3))
        x[np.arange(6), [0, 0, 1, 1, 2, 2]] = 1
        top = (loads @ x).max(-1)
        found = relaxed_cost(
            jnp.asarray(x), jnp.ones(6), jnp.asarray(loads), jnp.ones(4), 1e5,
            price=lambda tokens: tokens.max(-1),
        )  # fmt: skip
        # Price of the slowest rank, less a balanced one's, and the tie-break of a thousandth.
        np.testing.assert_allclose(found, 1.001 * top - 1, atol=2 * np.log(3) / 1e5)
