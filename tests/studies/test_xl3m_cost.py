"""What 20M tokens cost: the traced program against the closed form, and numbers worked by hand."""

import math

import pytest

from cmjax.cost import price
from cmjax.hardware import load_machine
from studies.xl3m_cost import (
    MACHINE,
    PLANS,
    QUESTION,
    ReadingPlan,
    activation_bytes,
    cache_bytes,
    cost,
    flops,
    layer_parameters,
    llama2_7b,
    memory_text,
    reading,
)


@pytest.fixture(scope="module")
def machine():
    return load_machine(MACHINE)


@pytest.fixture(scope="module")
def step(machine):
    return reading(machine)


@pytest.fixture(scope="module")
def program(step):
    return step.trace()


def test_the_model_has_the_parameters_of_llama_2_7b(step):
    config = llama2_7b()
    matrices = 32 * layer_parameters(config) + 2 * 32000 * 4096
    norms = (2 * 32 + 1) * 4096
    assert matrices + norms == 6_738_415_616  # as published
    # norms are float32 here
    assert step.weight_bytes == pytest.approx(2 * 6_738_415_616, rel=1e-4)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_trace_counts_the_flops_of_the_closed_form(plan, program, machine):
    found = cost(plan, program, machine)
    assert found.counted_flops == pytest.approx(found.formula_flops, rel=0.01)


@pytest.mark.parametrize(
    ("plan", "segments", "total", "ratio"),
    [
        (ReadingPlan(32_000), 62, 9.9e14, 0.69),
        (ReadingPlan(128_000), 249, 3.85e15, 1.55),
        (ReadingPlan(1_000_000), 1952, 2.98e16, 9.2),
        (ReadingPlan(20_000_000), 39062, 5.96e17, 176),
    ],
    ids=str,
)
def test_flops_worked_by_hand(plan, segments, total, ratio, program, machine):
    """P = 32 (4 d^2 + 3 d f) = 6.476e9; 2 P n + 2 L d n^2 at n = 1152 is 1.527e13."""
    assert plan.segments == segments
    by_hand = 2 * 6.476e9 * 1152 + 2 * 32 * 4096 * 1152**2
    assert by_hand == pytest.approx(1.527e13, rel=1e-3)
    found = cost(plan, program, machine)
    assert found.formula_flops == pytest.approx(total, rel=0.01)
    assert found.whole_flops / found.formula_flops == pytest.approx(ratio, rel=0.01)


def test_attention_is_two_percent_of_a_segment_and_nearly_all_of_the_whole():
    config = llama2_7b()

    def attention(tokens):
        return 2 * config.layers * config.hidden_size * tokens**2 / flops(config, tokens)

    assert attention(1024 + QUESTION) == pytest.approx(0.02, abs=0.005)
    assert attention(20_000_000) == pytest.approx(0.997, abs=0.001)


def test_the_price_lies_between_the_peak_and_a_quarter_of_it(program, machine):
    found = cost(ReadingPlan(20_000_000), program, machine)
    at_peak = found.formula_flops / (8 * float(machine.chip.cube_flops_16bit))
    assert at_peak < found.priced_s < 4 * at_peak


def test_cards_do_not_talk_so_batches_cost_in_proportion(program, machine):
    def seconds(segments):
        sizes = {"segments": segments, "length": 1152.0}
        return float(price(program, machine, sizes).total_s)

    assert program.totals({"segments": 32.0, "length": 1152.0})["node_bytes"] == 0
    assert seconds(64.0) == pytest.approx(2 * seconds(32.0), rel=0.02)


def test_the_whole_texts_cache_fits_nowhere_and_a_card_holds_its_batch(step, machine):
    config = llama2_7b()
    assert cache_bytes(config, 1) == 2**19
    assert cache_bytes(config, 20_000_000) / 2**40 == pytest.approx(9.5, abs=0.05)
    assert cache_bytes(config, 20_000_000) > 20 * 8 * float(machine.chip.hbm_bytes)
    used = step.weight_bytes + 32 * activation_bytes(config, 1152)
    assert used < float(machine.chip.hbm_bytes)
    assert "at most 83 segments" in memory_text(machine, step.weight_bytes)
    assert math.floor((64e9 - step.weight_bytes) / (1152 * 2**19)) == 83
