"""Ranks and nodes a token goes to, and grouping ranks so that it goes to fewer."""

import itertools

import numpy as np
import pytest

from cmjax.placement import Plan, Routes, group_ranks, reach


def random_case(seed=0, tokens=40, layers=2, experts=6, top_k=3):
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(-1)[..., :top_k]
    slots = np.concatenate([np.arange(experts), rng.integers(0, experts, 2)])
    return Plan(rng.permuted(np.tile(slots, (layers, 1)), axis=1), experts, 4, 2), Routes(
        ids, experts
    )


def test_reach_is_the_mean_over_all_choices_of_copies():
    plan, routes = random_case()
    found = reach(plan, routes)
    for layer in range(plan.layers):
        ranks = nodes = 0.0
        for token in routes.ids[:, layer]:
            places = [np.flatnonzero(plan.expert_of_slot[layer] == e) // 2 for e in token]
            combinations = list(itertools.product(*places))
            ranks += np.mean([len(set(c)) for c in combinations])
            nodes += np.mean([len({rank // 2 for rank in c}) for c in combinations])
        assert found.ranks[layer] == pytest.approx(ranks / routes.tokens)
        assert found.nodes[layer] == pytest.approx(nodes / routes.tokens)


def test_grouping_brings_experts_chosen_together_into_one_node():
    # Tokens choose 0 and 3, or 1 and 2; ranks 0, 1 are a node and hold 0 and 1.
    routes = Routes(np.array([[[0, 3]], [[1, 2]]] * 5), 4)
    plan = Plan(np.array([[0, 1, 2, 3]]), 4, 4, 2)
    assert reach(plan, routes).nodes == pytest.approx(2)
    grouped = group_ranks(plan, routes)
    assert reach(grouped, routes).nodes == pytest.approx(1)
    assert reach(grouped, routes).remote_nodes(2) == pytest.approx(0.5)


def test_grouping_permutes_the_tokens_of_ranks_and_never_adds_nodes():
    for seed in range(5):
        plan, routes = random_case(seed)
        grouped = group_ranks(plan, routes)
        counts = np.random.default_rng(seed).random((plan.layers, plan.experts))
        np.testing.assert_allclose(
            np.sort(grouped.tokens_per_rank(counts)), np.sort(plan.tokens_per_rank(counts))
        )


def test_experts_chosen_together_on_one_rank_save_a_copy():
    routes = Routes(np.tile([[0, 1]], (10, 1, 1)), 4)
    together, apart = (Plan(np.array([row]), 4, 2) for row in ([0, 1, 2, 3], [0, 2, 1, 3]))
    assert reach(together, routes).ranks == 1 and reach(apart, routes).ranks == 2


def test_shares_and_empty_slots_say_where_tokens_go():
    # Expert 0 lives on ranks 0 and 1, expert 1 on rank 1; rank 2 holds nothing.
    split = np.array([[0.25, 0, 0.75, 1, 0, 0]])
    plan = Plan(np.array([[0, -1, 0, 1, -1, -1]]), 2, 3, split=split)
    routes = Routes(np.tile([[0, 1]], (4, 1, 1)), 2)
    assert reach(plan, routes).ranks == pytest.approx(1.25)
    assert reach(plan.even(), routes).ranks == pytest.approx(1.5)


def test_routes_of_another_model_are_refused():
    routes = Routes(np.zeros((2, 1, 1), int), 5, source="mine")
    with pytest.raises(ValueError, match="plan has 1 layers of 4 experts, mine 1 of 5"):
        reach(Plan(np.array([[0, 1, 2, 3]]), 4, 2), routes)
