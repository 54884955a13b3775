"""Where stages begin: nothing that fits is faster, by trying all; and what a search makes of it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from cmjax.hardware import load_machine, replace_leaf
from cmjax.models.dense import DenseConfig
from cmjax.parallelism import Plan, Prices, memory_of, price_plan, replay, search
from cmjax.parallelism.boundaries import Waits, divisions
from cmjax.parallelism.layerwise import Counts
from cmjax.parallelism.memory import USABLE, stage_memory
from cmjax.parallelism.recomputation import fastest_stages, fewest_recomputed
from cmjax.parallelism.schedules import StageTimes, pipeline_s

MACHINE = load_machine("ascend910-2048")
WORDY = DenseConfig(layers=12, hidden=1024, heads=16, ffn=4096, vocab=51200, sequence=512)
"""Whose head takes as long as four of its layers."""
PLAN = Plan(pipeline=3, micro_batch=4)
BATCH = 32


def _all(layers, stages):
    """Every way to give every stage a layer or more."""
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, layers)))


@pytest.mark.parametrize("seed", range(30))
def test_no_division_is_faster(seed):
    """Stages of random times, growing with their layers, some of which do not fit."""
    random = np.random.default_rng(seed)
    layers, stages = int(random.integers(3, 12)), int(random.integers(1, 5))
    layers = max(layers, stages)
    grown = np.cumsum(random.uniform(0.1, 1.0, (stages, layers + 1)), 1)
    fits = random.integers(1, layers + 1, stages) + 1
    waits = Waits(slowest=float(random.integers(0, 6)), total=float(random.choice([0.2, 1.0])))

    def best(stage, n):
        return (grown[stage, n], Counts(n, 0, 0)) if n <= fits[stage] else (math.inf, None)

    def seconds(division):
        taken = [best(stage, n)[0] for stage, n in enumerate(division)]
        return waits.seconds(max(taken), sum(taken)) if max(taken) < math.inf else math.inf

    found = divisions(layers, stages, waits, best, 0.1)
    fastest = min(map(seconds, _all(layers, stages)))
    if fastest == math.inf:
        assert not found
        return
    assert all(sum(division) == layers and min(division) >= 1 for division in found)
    assert seconds(found[-1]) == pytest.approx(fastest, rel=1e-4)
    times = [seconds(division) for division in found]
    assert times == sorted(times, reverse=True)
    most = [max(division) for division in found]
    assert most == sorted(set(most))


def test_of_equal_divisions_the_most_even_one_is_taken():
    waits = Waits(slowest=7.0, total=1.0)
    found = divisions(10, 4, waits, lambda _, n: (float(n), Counts(n, 0, 0)), 1.0)
    assert [sorted(division) for division in found] == [[2, 2, 3, 3]]


def _fastest(usable, **change):
    plan, prices = dataclasses.replace(PLAN, **change), Prices(WORDY, MACHINE, (4,))

    def seconds(stage, counts):
        return prices.stage_s(plan, stage, counts)

    options = {"at_least": seconds, "waited": prices.waited_at_least(plan)}
    plans = fastest_stages(WORDY, plan, BATCH, usable, seconds, **options)
    return prices, plans, seconds


def test_no_boundaries_that_fit_make_a_faster_step():
    """Against all divisions, each with the fastest recomputation that fits, for three memories."""
    peaks = [memory_of(WORDY, dataclasses.replace(PLAN, recompute=r), BATCH).peak
             for r in ("full", "none")]  # fmt: skip
    uneven = set()
    for part in (0.1, 0.5, 1.0):
        usable = peaks[0] + part * (peaks[1] - peaks[0])
        prices, plans, seconds = _fastest(usable)
        best = min(prices.step(plan, BATCH).step_s for plan in plans)
        every = [
            fewest_recomputed(WORDY, dataclasses.replace(PLAN, layers=n), BATCH, usable, seconds)
            for n in _all(WORDY.layers, PLAN.pipeline)
        ]
        fastest = min(prices.step(plan, BATCH).step_s for plan in every if plan is not None)
        assert best == pytest.approx(fastest, rel=1e-6)
        for plan in plans:
            assert memory_of(WORDY, plan, BATCH).peak <= usable
            uneven.add(plan.layers)
    assert len(uneven) >= 2


def test_a_head_as_heavy_as_some_layers_leaves_the_last_stage_fewer():
    """Of 12 layers and a head of four: 16 / 3 each."""
    _, plans, _ = _fastest(math.inf)
    assert plans[0].layers == () and plans[0].stages(12) == (4, 4, 4)
    assert plans[-1].stages(12) in ((5, 5, 2), (6, 5, 1), (5, 6, 1))


def test_a_search_moves_boundaries_where_that_is_faster():
    found = search(WORDY, MACHINE, 8, 64, top=60)
    uneven = [each for each in found.plans if each.plan.layers]
    assert uneven
    for each in uneven:
        even = dataclasses.replace(each.plan, layers=(), recompute="full")
        assert each.step_s < price_plan(WORDY, MACHINE, even, 64).step_s
        again = price_plan(WORDY, MACHINE, each.plan, 64)
        assert again.step_s == pytest.approx(each.step_s)


def test_degrees_need_not_divide_the_layers():
    """Seven layers on four stages are searched, priced and found."""
    model = dataclasses.replace(WORDY, layers=7)
    machine = replace_leaf(MACHINE, "chip.hbm_bytes", 4e9)
    found = search(model, machine, 4, 64, top=1000)
    assert {each.plan.pipeline for each in found.plans} == {1, 2, 4}
    for each in found.plans:
        each.plan.check(model, 64)
        assert memory_of(model, each.plan, 64).peak <= USABLE * 4e9


def test_memory_of_a_stage_is_of_its_own_layers():
    """A stage between the ends holds its layers and neither end; state grows by the layer."""
    plan = Plan(pipeline=3, layers=(4, 6, 2), recompute="none")
    first, middle, last = (
        stage_memory(WORDY, plan, BATCH, stage, counts)
        for stage, counts in enumerate(plan.counts(12))
    )
    layer = 12 * 1024**2 + 13 * 1024
    words = 51200 * 1024
    assert middle.parameters == 2 * 6 * layer
    assert last.parameters == 2 * (2 * layer + words + 2 * 1024)
    assert first.parameters == 2 * (4 * layer + words + 512 * 1024)
    assert memory_of(WORDY, plan, BATCH).peak == max(first.peak, middle.peak, last.peak)


@pytest.mark.parametrize("stages", [(4, 4, 4, 2), (2, 4, 4, 4), (5, 4, 3, 2), (4, 3, 4, 3)])
def test_unlike_stages_take_no_longer_than_is_priced(stages):
    """Event by event, forward passes half as long as backward ones; at least 92 % of it."""
    m = 12
    times = StageTimes(slowest=3.0 * max(stages), total=3.0 * sum(stages), weights=0.0, send=0.0)
    found = pipeline_s("1f1b", times, m, len(stages))
    played = replay("1f1b", stages, [2 * n for n in stages], m)
    assert 0.92 * found <= played <= found * (1 + 1e-12)
