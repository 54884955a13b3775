"""Moves are as few as renaming ranks allows, come from ranks that hold them, and take time."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.hardware import load_machine
from cmjax.placement import Loads, Plan, Problem, greedy, match, transfers, wire_s

MACHINE = load_machine("cloudmatrix384")
EXPERT_BYTES = 44e6


@st.composite
def plan_pairs(draw, most_nodes=1, most=4):
    nodes = draw(st.integers(1, most_nodes))
    ranks, size = nodes * draw(st.integers(1, most)), draw(st.integers(1, 3))
    experts, layers = draw(st.integers(1, ranks * size)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    def one():
        rows = [rng.permutation(np.arange(ranks * size) % experts) for _ in range(layers)]
        return Plan(np.stack(rows), experts, ranks, nodes)

    return one(), one()


def by_rank(plan):
    return [[Counter(rank) for rank in layer.reshape(plan.ranks, -1).tolist()]
            for layer in plan.expert_of_slot]  # fmt: skip


def arrivals(current, proposed):
    """Weights that ranks hold in `proposed` and did not in `current`, copies counted."""
    return [[new - old for new, old in zip(one, two, strict=True)]
            for one, two in zip(by_rank(proposed), by_rank(current), strict=True)]  # fmt: skip


@settings(max_examples=60)
@given(plan_pairs())
def test_matching_keeps_the_plan_and_no_renaming_of_ranks_moves_less(plans):
    current, proposed = plans
    found = match(current, proposed)
    for layer, (old, new) in enumerate(zip(by_rank(current), by_rank(proposed), strict=True)):
        kept = by_rank(found)[layer]
        assert sorted(map(sorted, map(Counter.elements, kept))) == sorted(
            map(sorted, map(Counter.elements, new))
        )
        fewest = min(
            sum((new[a] - held).total() for a, held in zip(order, old, strict=True))
            for order in itertools.permutations(range(current.ranks))
        )
        changed = (found.expert_of_slot[layer] != current.expert_of_slot[layer]).sum()
        assert changed == fewest  # slots are kept too: only what arrives changes a slot


@settings(max_examples=40, deadline=None)
@given(plan_pairs(most_nodes=3, most=3))
def test_matching_keeps_nodes_together(plans):
    current, proposed = plans
    per_node = current.ranks // current.nodes

    def node_sets(plan):
        return [sorted(sorted(node) for node in layer.reshape(plan.nodes, -1).tolist())
                for layer in plan.expert_of_slot]  # fmt: skip

    found = match(current, proposed)
    assert node_sets(found) == node_sets(proposed) and per_node * current.nodes == found.ranks


@settings(max_examples=40, deadline=None)
@given(plan_pairs())
def test_moves_bring_every_rank_what_it_lacks_from_a_rank_that_has_it(plans):
    current, proposed = plans[0], match(*plans)
    found = transfers(current, proposed, MACHINE, expert_bytes=EXPERT_BYTES)
    brought = [[Counter() for _ in range(current.ranks)] for _ in range(current.layers)]
    for sent in found:
        assert by_rank(current)[sent.layer][sent.source][sent.expert] > 0
        assert sent.bytes == EXPERT_BYTES
        brought[sent.layer][sent.target][sent.expert] += 1
    assert brought == arrivals(current, proposed)


def test_a_plan_with_renamed_ranks_moves_nothing():
    rng = np.random.default_rng(0)
    plan = greedy(Problem(Loads(rng.random((1, 3, 16)) + 0.1), 8, 8))
    shuffled = plan.expert_of_slot.reshape(3, 8, 3)[:, rng.permutation(8), ::-1].reshape(3, 24)
    found = match(plan, Plan(shuffled, 16, 8))
    np.testing.assert_array_equal(found.expert_of_slot, plan.expert_of_slot)
    assert transfers(plan, found, MACHINE, expert_bytes=1.0) == ()


def test_empty_slots_receive_nothing_and_shares_go_with_their_slots():
    split = np.array([[0.25, 1.0, 0.75, 0.0]])
    current = Plan(np.array([[1, -1, 0, 0]]), 2, 2)
    proposed = Plan(np.array([[0, 1, 0, -1]]), 2, 2, split=split)
    found = match(current, proposed)
    np.testing.assert_array_equal(found.expert_of_slot, [[1, 0, 0, -1]])
    np.testing.assert_array_equal(found.split, [[1.0, 0.25, 0.75, 0.0]])
    (sent,) = transfers(current, found, MACHINE, expert_bytes=1.0)
    assert (sent.expert, sent.source, sent.target) == (0, 1, 0)


def test_a_rank_that_is_dead_in_the_new_plan_keeps_its_place():
    # By what they hold in common, rank 0's experts would go to rank 2, and the dead rank to 0.
    proposed = Plan(np.array([[2, 3, 0, 1, -1, -1, 4, 5]]), 6, 4)
    current = Plan(np.array([[0, 1, 4, 5, 2, 3, 0, 1]]), 6, 4)
    found = match(current, proposed)
    assert found.alive.tolist() == proposed.alive.tolist() == [True, True, False, True]
    counts = np.arange(6.0)[None]
    np.testing.assert_array_equal(
        np.sort(found.tokens_per_rank(counts)), np.sort(proposed.tokens_per_rank(counts))
    )


def test_weights_come_from_the_nearest_and_least_busy_holder():
    # 32 ranks on two nodes of 16; expert 0 lives on ranks 0, 2 and 16, and shall go to 3 and 17.
    old = np.arange(32)
    old[[0, 2, 16]] = 0
    new = old.copy()
    new[[3, 17]] = 0
    experts = 32 - int(np.isin(np.arange(32), old, invert=True).sum())
    _, old, new = (np.searchsorted(np.unique(old), row) for row in (old, old, new))
    new[0], new[2] = old[3], old[17]  # nothing is lost
    current, proposed = (Plan(row[None], experts, 32) for row in (old, new))
    found = {m.target: m.source for m in transfers(current, proposed, MACHINE, expert_bytes=1.0)}
    assert found[3] == 2 and found[17] == 16  # dies of one NPU
    assert found[0] == 3 and found[2] == 17


def test_wire_time_agrees_with_arithmetic_by_hand():
    plan = Plan(np.tile(np.arange(32), (2, 1)), 32, 32)
    swapped = plan.expert_of_slot.copy()
    swapped[0, [0, 1]] = [1, 0]  # dies of one NPU
    swapped[1, [2, 20]] = [20, 2]  # nodes
    moved = transfers(plan, Plan(swapped, 32, 32), MACHINE, expert_bytes=EXPERT_BYTES)
    tiers, eta = MACHINE.fabric, MACHINE.exchange.bandwidth_from_hbm
    expected = [
        EXPERT_BYTES / tier.bandwidth_bytes_per_s / eta + tier.latency_s
        for tier in (tiers.die, tiers.supernode)
    ]
    np.testing.assert_allclose(wire_s(moved, plan, MACHINE), expected, rtol=1e-12)
    assert (wire_s((), plan, MACHINE) == 0).all()


def test_ranks_that_receive_at_once_wait_only_for_the_busiest():
    plan = Plan(np.arange(8)[None], 8, 4)
    one = [m._replace(target=t) for t in (1, 2, 3)
           for m in transfers(plan, Plan(np.array([[2, 1, 0, 3, 4, 5, 6, 7]]), 8, 4), MACHINE,
                          expert_bytes=EXPERT_BYTES)[:1]]  # fmt: skip
    shared_source = wire_s([m._replace(source=0) for m in one[1:]], plan, MACHINE)
    apart = wire_s([one[1]._replace(source=0), one[2]._replace(source=1)], plan, MACHINE)
    latency = MACHINE.fabric.node.latency_s
    np.testing.assert_allclose(shared_source - latency, 2 * (apart - latency))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 4}, "differ in ranks: 2 and 4"),
        ({"experts": 3}, "differ in experts: 4 and 3"),
    ],
)
def test_plans_of_different_shapes_cannot_be_matched(change, message):
    current = Plan(np.array([[0, 1, 2, 3]]), 4, 2)
    slots = np.array([[0, 1, 2, 0]]) if "experts" in change else current.expert_of_slot
    other = Plan(slots, change.get("experts", 4), change.get("ranks", 2))
    with pytest.raises(ValueError, match=f"match: the plans {message}"):
        match(current, other)
    with pytest.raises(ValueError, match=f"transfers: the plans {message}"):
        transfers(current, other, MACHINE, expert_bytes=1.0)


def test_weights_without_bytes_are_refused():
    plan = Plan(np.array([[0, 1]]), 2, 2)
    with pytest.raises(ValueError, match="expert_bytes must be positive, got 0"):
        transfers(plan, plan, MACHINE, expert_bytes=0)
