"""Bytes between nodes from counts, and the places a token really goes to from routes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.placement import Plan, Routes, node_bytes, reach


def test_a_node_receives_its_share_from_the_others():
    tokens = np.array([[3.0, 1, 2, 2], [0, 4, 4, 0]])
    found = node_bytes(tokens, 2, 100.0)
    np.testing.assert_allclose(found, [[200, 200], [200, 200]])
    np.testing.assert_allclose(node_bytes(tokens, 4, 100.0), 75 * tokens)
    assert (node_bytes(tokens, 1, 100.0) == 0).all()
    with pytest.raises(ValueError, match="4 ranks do not divide over 3 nodes"):
        node_bytes(tokens, 3, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([(4, 1), (4, 2), (6, 3)]), st.integers(1, 3))
def test_reach_agrees_with_a_loop_over_tokens(seed, shape, top_k):
    ranks, nodes = shape
    rng = np.random.default_rng(seed)
    routes = Routes(rng.random((40, 2, 12)).argsort(-1)[..., :top_k], 12)
    rows = [rng.permutation(np.arange(24) % 12) for _ in range(2)]
    plan = Plan(np.stack(rows), 12, ranks, nodes)
    expected = np.zeros((2, 2))
    for number, token in enumerate(routes.ids):
        for layer, chosen in enumerate(token):
            slots = [np.flatnonzero(plan.experts[layer] == e) for e in chosen]
            at = {int(s[number % len(s)]) // plan.slots_per_rank for s in slots}
            expected[0, layer] += len(at) / 40
            expected[1, layer] += len({r // (ranks // nodes) for r in at}) / 40
    found = reach(plan, routes)
    np.testing.assert_allclose([found.ranks, found.nodes], expected)


def test_experts_chosen_together_on_one_rank_save_a_copy():
    routes = Routes(np.tile([[0, 1]], (10, 1, 1)), 4)
    together, apart = (Plan(np.array([row]), 4, 2) for row in ([0, 1, 2, 3], [0, 2, 1, 3]))
    assert reach(together, routes).ranks == 1 and reach(apart, routes).ranks == 2


def test_routes_of_another_model_are_refused():
    with pytest.raises(ValueError, match="plan has 1 layers of 4 experts, mine 1 of 5"):
        routes = Routes(np.zeros((2, 1, 1), int), 5, source="mine")
        reach(Plan(np.array([[0, 1, 2, 3]]), 4, 2), routes)
