"""The search: valid plans, never worse than what it is compared with, on what it is told to."""

import itertools
import time
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.placement import (
    Loads,
    Problem,
    Risk,
    SearchConfig,
    contiguous,
    evaluate,
    example_family,
    example_loads,
    greedy,
    greedy_global,
    greedy_hierarchical,
    lower_bound_time_s,
    one_spare,
    read_loads,
    search,
)
from cmjax.placement.judging.compare import objective_s
from cmjax.placement.methods.local_search import improve, start_state
from cmjax.placement.methods.search import search_inputs
from tests.placement.layer_time import slowest

SHORT = SearchConfig(starts=2, chunks=4, rounds=40, swaps_per_slot=10)


def random_problem(seed=0, windows=2, layers=2, experts=12, ranks=4, redundant=4, **kwargs):
    counts = np.random.default_rng(seed).random((windows, layers, experts)) ** 3 * 1000 + 1
    return Problem(Loads(counts), ranks, redundant, **kwargs)


def by_layer(plan, problem):
    """Mean time of every layer."""
    return slowest(plan.tokens_per_rank(problem.loads.counts)).mean(0)


@pytest.mark.parametrize("objective", ["mean", "worst", "cvar:0.6", "quantile:0.5"])
def test_tokens_and_copies_carried_along_are_those_of_the_plan(objective):
    problem = random_problem(1, windows=5, layers=3, redundant=8)
    loads, held, _ = search_inputs(problem, np.stack([greedy(problem).expert_of_slot] * 2))
    rng = np.random.default_rng(0)
    risk = Risk.parse(objective)
    state = improve(
        start_state(held, loads), loads, jnp.full(6, 0.5, jnp.float32),
        jnp.asarray(rng.exponential(size=(6, 5)), jnp.float32),
        jnp.asarray(rng.integers(0, problem.slots, (6, 5, 16)), jnp.int32),
        jnp.asarray(rng.exponential(size=(6, 5, 5, 4)), jnp.float32),
        layers=3, swaps=4, tail=risk.tail(5), ignore_slower=risk.kind == "quantile",
    )  # fmt: skip
    for row in range(6):
        experts = np.asarray(state.expert_of_slot)[row].reshape(1, -1)
        plan = Problem(problem.loads_of(np.array([row % 3])), 4, 8).plan(experts)
        counts = problem.loads.counts[:, row % 3 : row % 3 + 1]
        tokens = plan.tokens_per_rank(counts)[:, 0]
        # Sixty additions in single precision.
        np.testing.assert_allclose(
            state.tokens[row], tokens / tokens.mean(-1, keepdims=True), rtol=60 * 2**-23, atol=1e-5
        )
        np.testing.assert_array_equal(state.copies[row, :-1], plan.copies[0])


@pytest.mark.parametrize("objective", ["mean", "worst", "cvar:0.6", "quantile:0.5"])
def test_no_rule_is_better_by_the_objective_asked_for_nor_on_any_layer_by_the_mean(objective):
    counts = example_family(workloads=5, layers=3, experts=32).counts
    problem = Problem(Loads(counts), 8, 8, nodes=2, objective=Risk.parse(objective))
    plan = search(problem, slowest, config=SHORT)
    found = objective_s(plan, problem, slowest)
    for rule in (greedy, greedy_global, greedy_hierarchical, one_spare, contiguous):
        assert found <= objective_s(rule(problem), problem, slowest) * (1 + 1e-12)
        if objective == "mean":
            other = by_layer(rule(problem), problem)
            assert (by_layer(plan, problem) <= other * (1 + 1e-12)).all()
    assert found < 0.97 * objective_s(greedy(problem), problem, slowest)


def test_each_objective_is_best_served_by_the_plan_made_for_it():
    # Five workloads are alike, one is of its own kind: the mean may neglect it, the worst is it.
    alike, other = (example_loads(windows=1, layers=3, experts=32, seed=s).counts for s in (0, 1))
    counts = Loads(np.concatenate([alike] * 5 + [other])).scaled(1e6).counts
    plans = {}
    for objective in ("mean", "worst"):
        problem = Problem(Loads(counts), 8, 8, objective=Risk.parse(objective))
        plan = search(problem, slowest, config=SearchConfig(starts=3))
        plans[objective] = slowest(plan.tokens_per_rank(counts))
    assert plans["mean"].mean() < plans["worst"].mean()
    assert plans["worst"].sum(-1).max() < plans["mean"].sum(-1).max()


def test_a_layer_that_is_slow_in_one_window_is_made_up_for_by_another():
    # One spare copy a layer, two workloads with a hot expert each. Each layer for its own worst
    # would be slow in both; together one layer serves the first workload, one the second.
    counts = np.ones((2, 2, 3))
    counts[0, :, 0] = counts[1, :, 1] = 100
    problem = Problem(Loads(counts), 4, 1, objective=Risk("worst"))
    plan = search(problem, slowest, config=SHORT)
    times = slowest(plan.tokens_per_rank(counts)).sum(-1)
    np.testing.assert_allclose(times, 2e-5 + 1e-8 * (100 + 50))
    assert sorted(plan.copies[:, :2].argmax(-1).tolist()) == [0, 1]


def test_drifting_windows_are_balanced_in_each_not_in_their_mean():
    # Two experts are hot in turn: the mean cannot tell which to keep apart.
    counts = np.full((2, 1, 8), 10.0)
    counts[0, 0, :2] = 100
    counts[1, 0, 2:4] = 100
    plan = search(Problem(Loads(counts), 2), slowest, config=SHORT)
    np.testing.assert_allclose(plan.tokens_per_rank(counts), 130)


def test_a_perfect_packing_that_greedy_misses_is_found():
    # 3 + 3 and 2 + 2 + 2 would be perfect without equal sizes; with three slots a rank it takes
    # {5, 4, 0} and {3, 3, 3}, where heaviest first pairs the 5 with a 3.
    problem = Problem(Loads(np.array([[5.0, 4.0, 3.0, 3.0, 3.0, 1e-9]])), 2)
    assert greedy(problem).tokens_per_rank(problem.loads.counts).max() > 9.5
    plan = search(problem, slowest, config=SHORT)
    np.testing.assert_allclose(plan.tokens_per_rank(problem.loads.counts), 9.0)


def test_no_rank_gains_a_second_copy_of_an_expert():
    problem = random_problem(2, experts=16, ranks=8, redundant=16, layers=4)
    plan = search(problem, slowest, config=SHORT)
    for row in plan.expert_of_slot.reshape(-1, 4):
        assert len(set(row.tolist())) == 4


def test_the_same_seed_gives_the_same_plan():
    problem = random_problem(3)
    first, second = (search(problem, slowest, seed=5, config=SHORT) for _ in range(2))
    np.testing.assert_array_equal(first.expert_of_slot, second.expert_of_slot)


def test_progress_is_reported_to_the_end_and_never_gets_worse():
    seen = []
    search(random_problem(), slowest, progress=lambda *step: seen.append(step), config=SHORT)
    done, total, notes = zip(*seen, strict=True)
    best = [float(note.removesuffix(" ms")) for note in notes]
    assert done[-1] == total[0] == SHORT.chunks
    assert list(done) == sorted(done)
    assert all(later <= earlier for earlier, later in itertools.pairwise(best))


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_returns_the_best_plan_so_far(at):
    problem, calls = random_problem(), []

    def interrupt(done, total, note):
        calls.append(float(note.removesuffix(" ms")) / 1e3)
        if len(calls) == at:
            raise KeyboardInterrupt

    plan = search(problem, slowest, progress=interrupt, config=SHORT)
    assert len(calls) == at
    assert by_layer(plan, problem).sum() == pytest.approx(calls[-1])
    assert by_layer(plan, problem).sum() <= by_layer(greedy(problem), problem).sum()


def test_the_time_limit_stops_a_long_run():
    problem = random_problem()
    long = SearchConfig(chunks=10**4, rounds=1, swaps_per_slot=1e4)
    begin = time.monotonic()
    plan = search(problem, slowest, seconds=1.0, config=long)
    assert time.monotonic() - begin < 30
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
        search(random_problem(), price, config=SHORT)


def test_one_rank_needs_no_search():
    problem = random_problem(ranks=1, redundant=0)
    assert search(problem, slowest, config=SHORT).tokens_per_rank(problem.loads.counts).min() > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"starts": 0}, "starts must be at least 1, got 0"),
        ({"temperature": (0.0, 0.1)}, "temperature must be above 0, got"),
    ],
)
def test_a_config_that_cannot_run_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**wrong)


@pytest.mark.parametrize(
    ("name", "windows", "ranks"),
    [
        ("moe_esft_deepseek_v2_lite/law.npz", 4, 8),
        ("moe_olmoe_counts/olmoe_1b_7b.json:arxiv", 1, 32),
        ("moe_deepseek_v41_flash/v41_flash_q4_profile_hits_4layers.csv", 1, 32),
    ],
)
def test_real_loads_are_placed_better_than_by_any_rule_on_every_layer(data, name, windows, ranks):
    loads = read_loads(f"{data}/{name}", windows=windows)
    problem = Problem(loads.scaled(4096), ranks, ranks, nodes=2)
    found = by_layer(search(problem, slowest, config=SearchConfig(starts=2)), problem)
    rules = (greedy, greedy_global, greedy_hierarchical, one_spare, contiguous)
    best = np.min([by_layer(rule(problem), problem) for rule in rules], axis=0)
    assert (found <= best * (1 + 1e-12)).all()
    # Tokens of the busiest rank come within a few per cent of what no plan can beat.
    bound = lower_bound_time_s(problem, slowest)
    assert found.sum() < 1.03 * bound.mean(0).sum()
