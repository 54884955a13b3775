"""Ranks and nodes a token goes to, and grouping ranks so that it goes to fewer."""

import itertools

import numpy as np
import pytest

from cmjax.placement import Plan, group_ranks, reach


def random_case(seed=0, tokens=40, layers=2, experts=6, top_k=3):
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(-1)[..., :top_k]
    slots = np.concatenate([np.arange(experts), rng.integers(0, experts, 2)])
    return Plan(rng.permuted(np.tile(slots, (layers, 1)), axis=1), experts, 4, 2), ids


def test_reach_is_the_mean_over_all_choices_of_copies():
    plan, ids = random_case()
    found = reach(plan, ids)
    for layer in range(plan.layers):
        ranks = nodes = 0.0
        for token in ids[:, layer]:
            places = [np.flatnonzero(plan.experts[layer] == e) // 2 for e in token]
            combinations = list(itertools.product(*places))
            ranks += np.mean([len(set(c)) for c in combinations])
            nodes += np.mean([len({rank // 2 for rank in c}) for c in combinations])
        assert found.ranks[layer] == pytest.approx(ranks / len(ids))
        assert found.nodes[layer] == pytest.approx(nodes / len(ids))


def test_grouping_brings_experts_chosen_together_into_one_node():
    # Tokens choose 0 and 3, or 1 and 2; ranks 0, 1 are a node and hold 0 and 1.
    ids = np.array([[[0, 3]], [[1, 2]]] * 5)
    plan = Plan(np.array([[0, 1, 2, 3]]), 4, 4, 2)
    assert reach(plan, ids).nodes == pytest.approx(2)
    grouped = group_ranks(plan, ids)
    assert reach(grouped, ids).nodes == pytest.approx(1)
    assert reach(grouped, ids).remote_nodes(2) == pytest.approx(0.5)


def test_grouping_permutes_the_tokens_of_ranks_and_never_adds_nodes():
    for seed in range(5):
        plan, ids = random_case(seed)
        grouped = group_ranks(plan, ids)
        counts = np.random.default_rng(seed).random((plan.layers, plan.expert_count))
        np.testing.assert_allclose(
            np.sort(grouped.tokens_per_rank(counts)), np.sort(plan.tokens_per_rank(counts))
        )


@pytest.mark.parametrize(
    ("ids", "message"),
    [(np.zeros((3, 1, 2), int), r"shape \[tokens, 2"), (np.full((3, 2, 2), 6), "experts 0 to 5")],
)
def test_routes_of_another_model_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        reach(random_case()[0], ids)
