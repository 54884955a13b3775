"""Slot tables, replica choice, and schedules."""

from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.models.moe.presets import tiny
from cmjax.models.moe.schedule import Schedule, two_stream_decode
from cmjax.models.moe.slots import (
    SlotTable,
    choose_slots,
    ep_table,
    one_rank_table,
    plan_tables,
    stack_tables,
)
from cmjax.placement import Plan


def test_ep320_holds_one_expert_per_die():
    table = ep_table(256, 320, redundant=32, shared_replicas=32)
    assert table.slots_per_rank == 1
    count = Counter(table.experts_of_slot)
    assert count[256] == 32
    assert sorted(Counter(count[e] for e in range(256)).items()) == [(1, 224), (2, 32)]


def test_ep32_holds_eight_experts_and_a_redundant_one_per_die():
    table = ep_table(256, 32, redundant=32)
    assert table.slots_per_rank == 9
    assert not table.has_shared
    for rank in range(32):
        held = table.experts_of_slot[rank * 9 : rank * 9 + 9]
        assert held[:8] == tuple(range(rank * 8, rank * 8 + 8))
        assert len(set(held)) == 9  # the redundant one relieves another rank


def test_a_choice_goes_to_a_slot_that_holds_the_expert_and_replicas_share_evenly():
    table = ep_table(16, 8, redundant=4, shared_replicas=4)
    slots, copies = map(jnp.asarray, table.arrays())
    experts = jnp.broadcast_to(jnp.arange(17), (12, 17)).astype(jnp.int32)
    used = Counter()
    for rank in range(8):
        chosen = np.asarray(choose_slots(experts, rank, slots, copies))
        held = np.array(table.experts_of_slot)[chosen]
        np.testing.assert_array_equal(held, experts)
        used.update(chosen.ravel().tolist())
    for row in table.slots_of_expert:
        assert {used[slot] for slot in row} == {8 * 12 // len(row)}


def test_tables_of_several_layers_stack_although_their_copies_differ():
    tables = [SlotTable((0, 1, 2, 0), 2, 3), SlotTable((0, 1, 2, 2), 2, 3)]
    slots, copies = stack_tables([*tables, SlotTable((2, 0, 1, 1), 1, 3)])
    assert slots.shape == (3, 3, 2)
    np.testing.assert_array_equal(copies, [[2, 1, 1], [1, 1, 2], [1, 2, 1]])
    np.testing.assert_array_equal(slots[1, 2], [2, 3])


def test_one_rank_holds_everything_in_order():
    assert one_rank_table(5).experts_of_slot == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ep_table(256, 320), "256 slots do not divide over 320 ranks; 64 more redundant"),
        (lambda: ep_table(16, 8, redundant=-1), "redundant must be at least 0, got -1"),
        (lambda: SlotTable((0, 1, 1), 2, 2), "got 3 slots and 2 ranks"),
        (lambda: SlotTable((0, 1), 1, 4), "experts without a slot: 2, 3"),
        (lambda: SlotTable((0, 1, 5), 1, 2), "unknown experts 5.*0..1, the shared expert is 2"),
        (lambda: Schedule(microbatches=3), "microbatches must be 1 or 2, got 3"),
        (
            lambda: Schedule(order="layer"),  # type: ignore
            "order must be 'microbatch' or 'stage' or 'interleaved', got 'layer'",
        ),
        (lambda: Schedule(streams={"gate": ("a", 1, 1)}), r"unknown blocks \['gate'\]"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_schedules_of_equal_content_are_equal_and_hash_alike():
    assert two_stream_decode() == two_stream_decode()
    assert hash(two_stream_decode()) == hash(two_stream_decode())
    assert two_stream_decode() != Schedule(microbatches=2)


def _plan(experts=16, layers=2, ranks=4, extra=4):
    rows = [[*range(experts), *range(extra)]] * layers
    return Plan(np.array(rows), experts, ranks, source="plan.json")


def test_a_plan_gives_every_layer_its_slots_and_the_draft_layer_the_last():
    tables = plan_tables(_plan(), tiny(), 4, mtp=True)
    assert [table.experts_of_slot for table in tables] == [(*range(16), 0, 1, 2, 3)] * 3
    assert len(plan_tables(_plan(layers=3), tiny(), 4)) == 2


def test_a_plan_with_one_expert_more_gives_the_shared_expert_its_slots():
    rows = np.array([[*range(17), 16, 16, 0]] * 2)
    tables = plan_tables(Plan(rows, 17, 4), tiny(), 4)
    assert all(table.has_shared and table.routed_experts == 16 for table in tables)
    assert tables[0].slots_of_expert[16] == (16, 17, 18)


def test_a_model_without_one_shared_expert_has_no_slots_for_it():
    plan = Plan(np.array([[*range(17), 16, 16, 0]] * 2), 17, 4)
    with pytest.raises(ValueError, match="experts per layer: plan 17, model 16"):
        plan_tables(plan, replace(tiny(), shared_experts=2), 4)


@pytest.mark.parametrize("kind", ["empty slots", "shares"])
def test_a_plan_that_slot_tables_cannot_hold_is_refused(kind):
    plan = _plan()
    experts = (
        np.where(np.arange(20) == 19, -1, plan.expert_of_slot) if kind == "empty slots" else None
    )
    wrong = (
        replace(plan, split=plan.split_of_slot)
        if experts is None
        else replace(plan, expert_of_slot=experts)
    )
    with pytest.raises(ValueError, match=r"plan\.json: .* has empty slots or shares per slot"):
        plan_tables(wrong, tiny(), 4)
