"""The gradient method: a true gradient, valid plans, never worse than what it is compared with."""

import itertools
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.placement import (
    GradientConfig,
    Loads,
    Problem,
    contiguous,
    evaluate,
    gradient,
    greedy,
    read_loads,
)
from cmjax.placement.local_search import DRAWS, descend
from cmjax.placement.relaxation import RelaxedPlan, relaxed_cost, soft_copies, soft_places
from cmjax.placement.rounding import round_copies, round_places

SHORT = GradientConfig(restarts=2, steps=40, search_steps=100)


def slowest(tokens):
    return 1e-5 + 1e-8 * tokens.max(-1)


def random_problem(seed=0, windows=2, layers=2, experts=12, ranks=4, redundant=4):
    counts = np.random.default_rng(seed).random((windows, layers, experts)) ** 3 * 1000 + 1
    return Problem(Loads(counts), ranks, redundant)


def relaxed(seed, experts, ranks):
    rng = np.random.default_rng(seed)
    places = jnp.asarray(rng.normal(size=(experts, ranks)) * 0.3)
    return RelaxedPlan(places=places, copies=jnp.asarray(rng.normal(size=experts)))


def test_relaxed_plans_lose_no_token_and_respect_capacity():
    with jax.enable_x64(True):
        plan = relaxed(0, 12, 4)
        copies = soft_copies(plan, 16)
        placed = soft_places(plan.places, copies, 0.5)
    copies, placed = np.asarray(copies), np.asarray(placed)
    assert copies.min() >= 1
    np.testing.assert_allclose(copies.sum(), 16)
    np.testing.assert_allclose(placed.sum(-1), copies, rtol=1e-12)
    np.testing.assert_allclose(placed.sum(0), 4, rtol=1e-2)


@pytest.mark.parametrize("use_fixed", [0.0, 1.0])
def test_the_gradient_of_the_cost_agrees_with_central_differences(use_fixed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        plan = relaxed(2, 6, 3)
        counts = jnp.asarray(rng.random((2, 6)) * 100)
        noise = jnp.asarray(rng.normal(size=(3, 2, 3)))
        fixed = jnp.asarray([1.0, 2, 1, 1, 3, 1])

        @jax.jit
        def cost(plan):
            return relaxed_cost(
                plan, counts, 1e-5, fixed, use_fixed, 0.4, 0.05, noise,
                slots=9, layer_time_s=slowest,
            )  # fmt: skip

        slope = jax.grad(cost)(plan)
        for _ in range(5):
            along = RelaxedPlan(
                places=jnp.asarray(rng.normal(size=(6, 3))), copies=jnp.asarray(rng.normal(size=6))
            )
            ahead, behind = (
                cost(jax.tree.map(lambda x, d, s=sign: x + s * 1e-6 * d, plan, along))
                for sign in (1, -1)
            )
            expected = sum(
                jnp.vdot(a, b)
                for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(along), strict=True)
            )
            # Central differences err by 1e-6² and by 1e-16 / 1e-6.
            np.testing.assert_allclose((ahead - behind) / 2e-6, expected, rtol=1e-5)


@settings(max_examples=60)
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 5), st.data())
def test_rounding_fills_every_slot_and_keeps_every_expert(seed, ranks, size, data):
    slots = ranks * size
    experts = data.draw(st.integers(1, slots))
    rng = np.random.default_rng(seed)
    weights = rng.random((3, experts)) ** 4 + 1e-9
    soft = 1 + (slots - experts) * weights / weights.sum(-1, keepdims=True)
    copies = round_copies(soft, slots, ranks)
    assert (copies.sum(-1) == slots).all() and copies.min() >= 1
    if slots <= experts * ranks:
        assert copies.max() <= ranks
    placed = round_places(rng.random((3, experts, ranks)), copies, rng.random((3, experts)) + 0.1)
    for row in range(3):
        np.testing.assert_array_equal(np.bincount(placed[row], minlength=experts), copies[row])


def test_local_search_never_raises_the_price_and_keeps_plans_valid():
    problem = random_problem(layers=3)
    start = np.stack([contiguous(problem).experts, greedy(problem).experts])
    counts = jnp.asarray(problem.loads.counts, jnp.float32)
    uniform = np.random.default_rng(0).random((2, 3, 60, DRAWS, 32), np.float32)
    draws = jnp.asarray(uniform)
    found = descend(
        jnp.asarray(start), counts, jnp.full(3, 2e-5), draws,
        ranks=4, layer_time_s=slowest,
    )  # fmt: skip
    for before, after in zip(start, np.asarray(found), strict=True):
        times = [evaluate(problem.plan(p), problem.loads, slowest) for p in (before, after)]
        assert times[1].mean_time_s <= times[0].mean_time_s * (1 + 1e-6)
    assert times[1].gap >= -1e-9
    assert evaluate(problem.plan(np.asarray(found)[0]), problem.loads, slowest).gap < (
        evaluate(contiguous(problem), problem.loads, slowest).gap / 2
    )


@pytest.mark.parametrize(
    ("name", "windows", "ranks"),
    [
        ("moe_esft_deepseek_v2_lite/law.npz", 4, 8),
        ("moe_olmoe_counts/olmoe_1b_7b.json:arxiv", 1, 32),
    ],
)
def test_gradient_beats_the_baselines_on_real_loads(data, name, windows, ranks):
    loads = read_loads(f"{data}/{name}", windows=windows)
    loads = Loads(loads.counts[:, :4], loads.source).scaled(4096)
    problem = Problem(loads, ranks, ranks)
    plan = gradient(problem, slowest, config=SHORT)
    found, base, naive = (
        slowest(p.tokens_per_rank(loads.counts)).mean(0)
        for p in (plan, greedy(problem), contiguous(problem))
    )
    # Layer by layer it is never worse; over all layers there is room to be strictly better.
    assert (found <= base).all() and (found <= naive).all()
    assert found.sum() < base.sum()
    assert evaluate(plan, loads, slowest).gap < 0.9 * evaluate(greedy(problem), loads, slowest).gap


def test_drifting_windows_are_balanced_in_each_not_in_their_mean():
    # Two experts are hot in turn: the mean cannot tell which to keep apart.
    counts = np.full((2, 1, 8), 10.0)
    counts[0, 0, :2] = 100
    counts[1, 0, 2:4] = 100
    problem = Problem(Loads(counts), 2)
    plan = gradient(problem, slowest, config=SHORT)
    np.testing.assert_allclose(plan.tokens_per_rank(counts), 130)


def test_the_same_seed_gives_the_same_plan():
    problem = random_problem(3)
    first, second = (gradient(problem, slowest, seed=5, config=SHORT) for _ in range(2))
    np.testing.assert_array_equal(first.experts, second.experts)


def test_a_price_that_depends_on_every_rank_is_followed():
    # Rank 3 is twice as slow as the others, so it should end with about half their tokens.
    slowness = np.array([1.0, 1.0, 1.0, 2.0])

    def uneven(tokens):
        return 1e-6 + 1e-8 * (tokens * slowness).max(-1)

    problem = random_problem(7, windows=1, layers=1, experts=40, redundant=8)
    plan = gradient(problem, uneven, config=SHORT)
    tokens = plan.tokens_per_rank(problem.loads.counts)[0, 0]
    assert tokens[3] < 0.6 * tokens[:3].mean()


def test_progress_is_reported_to_the_end_and_never_gets_worse():
    seen = []
    gradient(random_problem(), slowest, on_step=lambda *step: seen.append(step), config=SHORT)
    done, total, best = zip(*seen, strict=True)
    assert done[-1] == total[0] == SHORT.steps + SHORT.search_steps
    assert list(done) == sorted(done)
    assert all(later <= earlier for earlier, later in itertools.pairwise(best))


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupt_returns_the_best_plan_so_far(at):
    problem, calls = random_problem(), []

    def interrupt(done, total, best):
        calls.append(best)
        if len(calls) == at:
            raise KeyboardInterrupt

    plan = gradient(problem, slowest, on_step=interrupt, config=SHORT)
    assert len(calls) == at
    time_s = evaluate(plan, problem.loads, slowest).mean_time_s
    assert time_s == pytest.approx(calls[-1])
    assert time_s <= evaluate(greedy(problem), problem.loads, slowest).mean_time_s


def test_the_time_limit_stops_a_long_run():
    problem = random_problem()
    gradient(problem, slowest, config=SHORT)  # compiled
    long = GradientConfig(restarts=2, steps=10**6, search_steps=10**6, chunk=SHORT.chunk)
    begin = time.monotonic()
    plan = gradient(problem, slowest, seconds=1.0, config=long)
    assert time.monotonic() - begin < 15
    assert evaluate(plan, problem.loads, slowest).gap >= -1e-9


@pytest.mark.parametrize(
    ("price", "message"),
    [
        (lambda t: t, "the last axis, ranks, reduced"),
        (lambda t: t.max(-1) * np.nan, "expected finite seconds"),
        (partial(jnp.sum, axis=0), "the last axis, ranks, reduced"),
    ],
)
def test_a_price_of_the_wrong_kind_is_refused(price, message):
    with pytest.raises(ValueError, match=message):
        gradient(random_problem(), price, config=SHORT)


class Line:
    """A price as an object that is equal by value, and so cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, tokens):
        return slowest(tokens)


def test_an_unhashable_price_is_accepted_also_in_double_precision():
    problem = random_problem()
    with jax.enable_x64(True):
        plan = gradient(problem, Line(), config=GradientConfig(steps=20, search_steps=20))
    assert evaluate(plan, problem.loads, slowest).gap >= -1e-9


def test_a_config_without_restarts_is_refused():
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        GradientConfig(restarts=0)
