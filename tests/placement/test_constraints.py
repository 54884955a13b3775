"""Dead ranks, budgets of slots, a running plan and its moves, shared experts, uneven splits."""

import numpy as np
import pytest

from cmjax.placement import (
    Loads,
    Plan,
    Problem,
    Risk,
    choose_slots,
    count_moves,
    evaluate,
    example_family,
    greedy,
    optimise_split,
    place,
    repair,
    step_par,
)
from cmjax.placement.compare import compare, objective_s
from cmjax.placement.plan import EMPTY
from cmjax.placement.shared import with_shared


def slowest(tokens):
    return 1e-5 + 1e-8 * tokens.max(-1)


@pytest.fixture(scope="module")
def family():
    return Loads(example_family(workloads=4, layers=3, experts=24).counts)


@pytest.mark.parametrize("method", ["search", "greedy", "one-spare", "contiguous", "random"])
def test_dead_ranks_hold_nothing_and_the_rest_serve_everything(family, method):
    family = Loads(family.counts, layer_labels=(3, 4, 9))
    problem = Problem(family, 8, 16, nodes=2, without_ranks=(1, 6))
    plan = place(problem, method, slowest)
    experts = plan.experts.reshape(3, 8, -1)
    assert (experts[:, [1, 6]] == EMPTY).all()
    tokens = plan.tokens_per_rank(family.counts)
    assert (tokens[..., [1, 6]] == 0).all()
    np.testing.assert_allclose(tokens.sum(-1), family.counts.sum(-1))
    found = evaluate(plan, family, slowest)
    np.testing.assert_allclose(found.par, tokens.max(-1) / (tokens.sum(-1) / 6))
    assert found.gap >= -1e-9 and plan.layer_labels == (3, 4, 9)


def test_slots_go_where_they_save_most(family):
    counts = np.array(family.counts)
    counts[:, 1] = 100.0  # a balanced layer needs no redundancy
    problem = Problem(Loads(counts), 8, 24)
    chosen = choose_slots(problem, slowest, 3 * 3 + 3)
    assert sum(chosen.usable) <= 12 and chosen.usable[1] == 3
    plan = place(chosen, "greedy", slowest)
    filled = (plan.experts != EMPTY).reshape(3, 8, -1).sum(-1)
    np.testing.assert_array_equal(filled.max(-1), chosen.usable)
    other = place(Problem(Loads(counts), 8, 24, slots_by_layer=(3, 6, 3)), "greedy", slowest)
    assert objective_s(plan, problem, slowest) < objective_s(other, problem, slowest)
    with pytest.raises(ValueError, match="at least 9 are needed"):
        choose_slots(problem, slowest, 8)


def test_repair_spends_no_more_moves_than_allowed_and_gains_with_each(family):
    problem = Problem(family, 8, 8, objective=Risk("worst"))
    current = place(problem, "contiguous", slowest)
    assert count_moves(current, current) == 0
    before, plans = objective_s(current, problem, slowest), []
    for moves in (0, 6, 40):
        plan = repair(problem, current, slowest, moves=moves)
        assert count_moves(plan, current) <= moves
        plans.append(objective_s(plan, problem, slowest))
    assert plans[0] == pytest.approx(before)
    assert plans[2] < plans[1] < 0.95 * before


def test_repair_places_the_experts_of_a_dead_rank_first(family):
    current = greedy(Problem(family, 8, 8))
    problem = Problem(family, 8, 8, without_ranks=(2,))
    need = sum(
        24 - len(set(np.delete(row.reshape(8, -1), 2, axis=0).ravel().tolist()))
        for row in current.experts
    )
    plan = repair(problem, current, slowest, moves=need)
    assert not plan.alive[2] and count_moves(plan, current) == need > 0
    with pytest.raises(ValueError, match=f"at least {need} are needed"):
        repair(problem, current, slowest, moves=need - 1)


def test_uneven_shares_help_where_copies_are_on_unequal_ranks(family):
    problem = Problem(family, 8, 8, objective=Risk("worst"))
    plan = greedy(problem)
    uneven = optimise_split(plan, problem, slowest)
    np.testing.assert_array_equal(uneven.experts, plan.experts)
    assert objective_s(uneven, problem, slowest) < objective_s(plan, problem, slowest)
    # By hand: 60 tokens on two copies beside 10 and 30 other tokens end at 50 on both.
    counts = np.array([[60.0, 10, 30]])
    tiny = Problem(Loads(counts), 2, 1)
    found = optimise_split(tiny.plan(np.array([[0, 1, 0, 2]])), tiny, slowest)
    np.testing.assert_allclose(found.tokens_per_rank(counts), [[50, 50]], rtol=1e-2)


def test_steps_of_few_tokens_are_less_balanced_than_totals(family):
    plan = greedy(Problem(family, 8, 8))
    par = evaluate(plan, family, slowest).par
    few, many = (step_par(plan, family, n, samples=8) for n in (64 * 8, 10**7))
    assert (few.mean() > par.mean() + 0.05).all()
    # Ten million assignments leave fluctuations of about a thousandth.
    np.testing.assert_allclose(many, par, rtol=5e-3)
    with pytest.raises(ValueError, match="at least 1"):
        step_par(plan, family, 0)


def test_a_shared_expert_gets_the_replicas_that_its_tokens_need():
    # EP320 of CloudMatrix-Infer: 256 routed experts of top 8 in even use, one shared, 320 slots.
    loads = with_shared(Loads(np.full((1, 256), 8.0)), 1, top_k=8)
    plan = greedy(Problem(loads, 320, 63))
    assert plan.expert_count == 257 and plan.copies[0, 256] >= 32
    with pytest.raises(ValueError, match="top_k of 1 or more"):
        with_shared(loads, 1, top_k=0)


def test_the_example_family_is_spread_like_recorded_ones():
    counts = example_family(layers=8).counts
    hottest = (counts.max(-1) / counts.mean(-1)).mean(1)
    assert ((hottest > 5.6) & (hottest < 8.1)).all()
    busy = -np.sort(-counts, axis=-1)[..., :128]
    slope = np.polyfit(np.log(np.arange(1, 129)), np.log(busy).mean((0, 1)), 1)[0]
    assert -0.58 < slope < -0.42
    tokens = greedy(Problem(Loads(counts), 32, 32)).tokens_per_rank(counts)
    par = (tokens.max(-1) / tokens.mean(-1)).mean(1)
    assert 1.1 < par.mean() < 1.2 and 1.2 < par.max() < 1.35


def test_768_ranks_work():
    loads = Loads(example_family(workloads=1, layers=1).counts)
    plan = place(Problem(loads, 768, 512), "greedy", slowest)
    assert evaluate(plan, loads, slowest).gap < 0.3


def test_methods_are_compared_where_they_planned_and_where_not(family):
    train, test = Loads(family.counts[:2]), Loads(family.counts[2:])
    problem = Problem(train, 8, 8)
    found = compare(problem, ("greedy", "search"), slowest, test=test, step_assignments=512)
    for judged in found.values():
        assert judged.gap >= -1e-9 and judged.served.par.shape == (2, 3)
        assert judged.step_par.shape == (2, 3) and judged.reach is None
    assert found["search"].objective_s <= found["greedy"].objective_s


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without_ranks": (9,)}, "ranks 0 to 7, got 9"),
        ({"without_ranks": (0, 1, 2, 3, 4)}, "fewer than 24; redundant of at least 40 is needed"),
        ({"slots_by_layer": (4, 4)}, "3 numbers of at most 4"),
        ({"slots_by_layer": (4, 5, 4)}, "3 numbers of at most 4"),
    ],
)
def test_constraints_that_cannot_be_met_are_refused(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        Problem(family, 8, 8, **arguments)


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"sum to 1, found 0\.9 for expert 0 of layer 0"):
        Plan(np.array([[0, 1, 0, 2]]), 3, 2, split=np.array([[0.5, 1, 0.4, 1]]))
