"""A mixture of experts in training: its parameters, its FLOP, and what exchanges cost."""

import dataclasses

import pytest

import cmjax
from cmjax.hardware import load_machine
from cmjax.models.moe.config import GroupedAttention
from cmjax.models.moe.presets import deepseek_v3, qwen3_8b, qwen3_30b_a3b
from cmjax.parallelism import MoETraining, parse_plan
from cmjax.parallelism.experts import price_experts

SMALL = MoETraining(
    model=dataclasses.replace(qwen3_30b_a3b(), layers=6, hidden_size=512, routed_experts=16),
    sequence=512,
)
PLAN = "data=32,pipeline=2,expert=16,recompute=none,optimizer=zero1"
BATCH = 256


@pytest.fixture(scope="module")
def machine():
    return load_machine("h800-pod")


def test_deepseek_v3_has_671_billion_parameters():
    """Of the report (arXiv 2412.19437), without the module that predicts a second token."""
    training = MoETraining(model=deepseek_v3(), sequence=4096)
    assert training.parameters == pytest.approx(671e9, rel=2e-3)


def test_a_device_holds_its_share_of_the_experts(machine):
    few, many = (
        price_experts(
            SMALL, machine, parse_plan(f"{PLAN},expert={e}".replace("expert=16,", "")), BATCH
        )
        for e in (4, 16)
    )
    model = SMALL.model
    one = 3 * model.hidden_size * model.expert_ffn_size
    layers = model.layers // 2
    fewer = 2 * layers * one * (model.routed_experts // 4 - model.routed_experts // 16)
    assert few.memory.parameters - many.memory.parameters == fewer
    assert few.memory.optimizer == pytest.approx(many.memory.optimizer)  # spread either way


def test_mfu_counts_what_a_token_visits(machine):
    """6 FLOP per parameter and token, and attention: 12 h s with heads of h in all, half of them
    unseen."""
    model, priced = SMALL.model, price_experts(SMALL, machine, parse_plan(PLAN), BATCH)
    attention = model.attention
    assert isinstance(attention, GroupedAttention)
    width = model.heads * attention.head_dim
    projections = model.hidden_size * (2 * width + 2 * attention.kv_heads * attention.head_dim)
    experts = 3 * model.hidden_size * model.expert_ffn_size * model.experts_per_token
    router = model.hidden_size * model.routed_experts
    active = model.layers * (projections + experts + router) + model.vocab_size * model.hidden_size
    per_token = 6 * active + 6 * model.layers * width * SMALL.sequence
    peak = float(machine.chip.cube_flops_16bit)
    assert priced.mfu * peak / priced.tokens_per_s_per_device == pytest.approx(per_token, rel=0.02)


def test_exchanges_are_waited_for_unless_they_are_hidden(machine):
    def step_s(plan: str, machine) -> float:
        return price_experts(SMALL, machine, parse_plan(plan), BATCH).step_s

    tier = machine.fabric.supernode
    faster = dataclasses.replace(tier, bandwidth_bytes_per_s=2 * tier.bandwidth_bytes_per_s)
    fast = dataclasses.replace(
        machine, fabric=dataclasses.replace(machine.fabric, supernode=faster)
    )
    waited, hidden = step_s(PLAN, machine), step_s(f"{PLAN},overlap=true", machine)
    assert hidden < waited
    assert step_s(PLAN, fast) < waited
    # Eight ranks of a node exchange nothing between nodes.
    inside = PLAN.replace("expert=16", "expert=8") + ",order=tensor-data-pipeline,overlap=true"
    assert step_s(inside, fast) == pytest.approx(step_s(inside, machine), rel=0.02)


def test_what_is_recomputed_is_not_kept_and_takes_time(machine):
    kinds = [
        price_experts(SMALL, machine, parse_plan(PLAN.replace("none", kind)), BATCH)
        for kind in ("none", "selective", "full")
    ]
    kept = [each.memory.activations for each in kinds]
    assert kept == sorted(kept, reverse=True)
    assert max(kinds, key=lambda each: each.step_s) is kinds[2]


def test_stages_may_have_unlike_numbers_of_layers(machine):
    """What is said of even ones is what goes without saying; the last stage, which computes the
    loss, is waited for if it is fuller, and a fuller first one holds more."""
    steps = []
    for layers in ("", ",layers=3-3", ",layers=4-2", ",layers=2-4"):
        plan = parse_plan(f"data=16,pipeline=2,expert=16,optimizer=zero1,recompute=none{layers}")
        found = price_experts(SMALL, machine, plan, BATCH)
        steps.append((found.step_s, found.memory.peak))
    assert steps[0] == steps[1]
    assert steps[3][0] > max(steps[0][0], steps[2][0])
    assert steps[2][1] > steps[0][1]


@pytest.mark.parametrize(
    "plan, says",
    [
        ("data=32,expert=3", "expert=3 must divide data=32 and the 16 experts"),
        ("data=32,expert=32", "expert=32 must divide data=32 and the 16 experts"),
        ("data=16,tensor=2", "is priced with tensor=1"),
        ("data=16,context=3", "context=3 must divide data=16, the sequence of 512 tokens"),
        ("data=16,expert=4,context=8", "and, but for expert=1, expert=4"),
        ("data=8,pipeline=8", "pipeline=8 is more than the 6 layers"),
        ("data=8,pipeline=2,layers=2-3", "layers=2-3 makes 5; the model has 6"),
        ("data=96", "data=96 x micro_batch=1 does not divide the global batch of 256"),
        ("data=256,pipeline=2", "512 devices are asked for; h800-pod has 384"),
        ("expert=0", "expert must be a whole number >= 1"),
    ],
)
def test_plans_that_do_not_divide_are_refused(plan, says, machine):
    with pytest.raises(ValueError, match=says):
        cmjax.parallel(SMALL, machine, plan=plan, global_batch=BATCH)


def test_a_model_that_fits_nowhere_says_how_much_is_missing(machine):
    with pytest.raises(ValueError, match=r"fits nowhere on 6 devices.* GiB are missing"):
        cmjax.parallel("qwen3-30b-a3b", machine, devices=6, global_batch=24)


def test_a_dense_model_has_no_experts_to_share(machine):
    with pytest.raises(ValueError, match="no layers with experts"):
        MoETraining(model=qwen3_8b(), sequence=512)
    with pytest.raises(ValueError, match="expert=2 needs a mixture of experts"):
        cmjax.parallel("pangu-2.6b", machine, plan="data=8,expert=2")


def test_ranks_that_share_sequences_keep_a_part_of_each(machine):
    long = dataclasses.replace(SMALL, sequence=8192)
    alone, shared = (
        price_experts(long, machine, parse_plan(f"data=8,expert=8,recompute=none{more}"), batch)
        for more, batch in (("", 8), (",context=4", 2))
    )
    assert alone.memory.parameters == shared.memory.parameters
    # All keys and values are on every rank; everything else is a quarter.
    assert 0.25 < shared.memory.activations / alone.memory.activations < 0.35
    # A rank waits for the one whose tokens see the whole sequence.
    rates = shared.tokens_per_s_per_device, alone.tokens_per_s_per_device
    assert 0.5 < rates[0] / rates[1] < 1


@pytest.mark.slow
def test_a_search_shares_a_sequence_that_is_the_only_one(machine):
    long = dataclasses.replace(SMALL, sequence=8192)
    found = cmjax.parallel(long, machine, devices=4, global_batch=1).plans
    assert all(each.plan.context == each.plan.data for each in found)
    assert {each.plan.expert for each in found} > {1}


@pytest.mark.slow
def test_a_search_finds_the_fastest_of_the_plans_that_fit(machine):
    found = cmjax.parallel(SMALL, machine, devices=4, global_batch=64, top=3)
    assert [plan.step_s for plan in found.plans] == sorted(plan.step_s for plan in found.plans)
    assert found.model == "a mixture of experts"
    assert found.best.plan.expert > 1
    again = cmjax.parallel(SMALL, machine, plan=found.best.plan, global_batch=64)
    assert again.best.step_s == found.best.step_s
