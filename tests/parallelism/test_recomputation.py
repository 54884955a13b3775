"""As little is recomputed as fits: nothing that fits is faster, and memory and time say so."""

import dataclasses
import itertools

import pytest

from cmjax.hardware import load_machine, replace_leaf
from cmjax.models.dense import DenseConfig
from cmjax.parallelism import Plan, Prices, memory_of, replay
from cmjax.parallelism.layerwise import Counts, Layerwise, shortest
from cmjax.parallelism.memory import USABLE
from cmjax.parallelism.recomputation import fewest_recomputed
from cmjax.parallelism.schedules import StageTimes, pipeline_s

SMALL = DenseConfig(
    layers=4, hidden=1024, heads=16, ffn=4096, vocab=8000, sequence=512, query_layer=True
)
PLAN = Plan(pipeline=2, micro_batch=4)
BATCH = 32
MACHINE = load_machine("ascend910-2048")
CHOICES = [(full, some) for full in range(3) for some in range(3 - full)]


def _with(first, second):
    return dataclasses.replace(PLAN, recompute=shortest([Counts(2, *first), Counts(2, *second)]))


def _fewest(prices, usable):
    return fewest_recomputed(SMALL, PLAN, BATCH, usable, lambda s, c: prices.stage_s(PLAN, s, c))


def test_no_layers_that_fit_make_a_faster_step():
    """Against all numbers of two stages, priced and weighed one by one, for several memories."""
    prices = Prices(SMALL, MACHINE, (4,))
    plans = [_with(*pair) for pair in itertools.product(CHOICES, CHOICES)]
    priced = [(prices.step(p, BATCH).step_s, memory_of(SMALL, p, BATCH).peak) for p in plans]
    least, most = min(peak for _, peak in priced), max(peak for _, peak in priced)
    found = set()
    for part in (0.0, 0.3, 0.6, 1.0):
        usable = least + part * (most - least)
        best = _fewest(prices, usable)
        assert best is not None and memory_of(SMALL, best, BATCH).peak <= usable
        fastest = min(seconds for seconds, peak in priced if peak <= usable)
        assert prices.step(best, BATCH).step_s == pytest.approx(fastest, rel=1e-6)
        found.add(best.recompute)
    assert len(found) >= 3
    assert _fewest(prices, least - 1) is None


def test_memory_and_time_of_some_layers_lie_between_those_of_none_and_all():
    plans = [
        dataclasses.replace(PLAN, recompute=recompute)
        for recompute in ("none", Layerwise(full=(1,)), "full")
    ]
    prices = Prices(SMALL, MACHINE, (4,))
    peaks = [memory_of(SMALL, plan, BATCH).peak for plan in plans]
    steps = [prices.step(plan, BATCH).step_s for plan in plans]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    assert steps == sorted(steps) and len(set(steps)) == 3


@pytest.mark.parametrize("backward", [(3, 2.5, 2, 2), (2, 3, 2, 2), (2, 2, 2.5, 3)])
def test_a_pipeline_of_uneven_stages_takes_no_longer_than_is_priced(backward):
    """And at least 95 % of that, event by event; forward passes are alike."""
    m, p, forward = 12, 4, 1.0
    stages = [forward + b for b in backward]
    times = StageTimes(slowest=max(stages), total=sum(stages), weights=0.0, send=0.0)
    found = pipeline_s("1f1b", times, m, p)
    assert 0.95 * found <= replay("1f1b", [forward] * p, backward, m) <= found


def test_a_search_recomputes_no_more_than_it_must():
    """On a device on which neither nothing nor all of one kind is best."""
    prices = Prices(SMALL, MACHINE, (4,))
    kinds = ("none", "selective", "full")
    alike = [dataclasses.replace(PLAN, recompute=kind) for kind in kinds]
    peaks = [memory_of(SMALL, plan, BATCH).peak for plan in alike]
    usable = (peaks[0] + peaks[1]) / 2
    machine = replace_leaf(MACHINE, "chip.hbm_bytes", usable / USABLE)
    best = _fewest(Prices(SMALL, machine, (4,)), usable)
    assert best is not None and isinstance(best.recompute, Layerwise)
    fitting = [plan for plan, peak in zip(alike, peaks, strict=True) if peak <= usable]
    assert prices.step(best, BATCH).step_s < min(
        prices.step(plan, BATCH).step_s for plan in fitting
    )


def test_layers_recomputed_whole_save_nothing_while_gradients_of_weights_wait():
    """Under zero_bubble; under 1F1B they do."""
    model = dataclasses.replace(SMALL, query_layer=False)
    for schedule, saves in (("zero_bubble", False), ("1f1b", True)):
        full, selective = (
            memory_of(
                model,
                dataclasses.replace(PLAN, schedule=schedule, recompute=recompute),
                BATCH,
            ).activations
            for recompute in ("full", "selective")
        )
        assert (full < selective) == saves
