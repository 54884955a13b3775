"""The event loop keeps what it must keep, whatever the service; C++ and Python say the same
bits."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from cmjax.serving.engine import COLOCATED, DECODE, FIXED, EngineOutputs, native
from cmjax.serving.engine.outputs import COMPLETED, MOST_BINS, REJECTED, REJECTED_LATE
from cmjax.serving.engine.run import hits, run
from cmjax.serving.engine.simulation import Simulation
from tests.serving.scenarios import inputs, requests, services, table, workers

needs_kernels = pytest.mark.skipif(not native.available(), reason="the kernels were not built")


@needs_kernels
@settings(max_examples=300)
@given(services())
def test_both_loops_give_the_same_bits(service):
    python, cpp = Simulation(service).run(), native.simulate(service)
    for field in dataclasses.fields(EngineOutputs):
        one, other = getattr(python, field.name), getattr(cpp, field.name)
        np.testing.assert_array_equal(one, other, err_msg=field.name, strict=field.name != "events")


@settings(max_examples=200)
@given(services())
def test_every_request_ends_once_and_nothing_happens_before_its_cause(service):
    ended: list[int] = []
    simulation = Simulation(service)
    finish = simulation._end
    simulation._end = lambda request, how, now: (ended.append(request), finish(request, how, now))
    found = simulation.run()
    always = bool(np.isfinite(service.back_s).all())
    assert always and sorted(ended) == list(range(len(found.ended)))
    done = found.ended == COMPLETED
    assert np.isin(found.ended, (COMPLETED, REJECTED, REJECTED_LATE)).all()
    assert (found.scheduled_s[done] >= found.arrival_s[done]).all()
    assert (found.first_s[done] > found.scheduled_s[done]).all()
    decoded = done & (found.decode_s >= 0)
    assert (found.decode_s[decoded] >= found.first_s[decoded]).all()
    assert (found.last_s[decoded] > found.decode_s[decoded]).all()
    alone = done & (service.requests.output == 1)
    assert (found.last_s[alone] == found.first_s[alone]).all()
    assert (found.first_s[found.ended == REJECTED] == -1).all()
    assert (found.hit_tokens < service.requests.prompt).all()


@settings(max_examples=200)
@given(services())
def test_memory_is_never_more_than_a_worker_has(service):
    simulation = Simulation(service)
    start = simulation.scheduler.start
    clock: list[float] = []

    def checked(worker, now):
        assert not clock or now >= clock[-1], "time runs backwards"
        clock.append(now)
        started = start(worker, now)
        assert worker.kv <= worker.capacity
        assert len(worker.batch) <= worker.max_requests
        assert worker.decoding == len(worker.batch) - len(worker.prefilling)
        return started

    simulation.scheduler.start = checked
    found = simulation.run()
    limit = np.where(service.workers.capacity == 0, 1 << 62, service.workers.capacity)
    assert (found.peak_kv <= limit).all()
    for worker in simulation.workers:  # nothing is left behind
        assert worker.kv == worker.growth == worker.decoding == worker.outstanding == 0
        assert not worker.batch and not worker.waiting and worker.coming == 0


def test_one_request_takes_what_its_steps_take():
    """3 tokens after the first: a prefill step, a hand-over of 10 tokens, 3 decode steps."""
    service = inputs(
        requests([1.0], [10], [4]),
        workers({}, {"role": DECODE, "table": 1}),
        (table(base=0.5, per_token=0), table(base=0.25, per_token=0, per_request=0, per_context=0)),
        handover_s=0.01,
        handover_latency_s=0.05,
    )
    found = run(service)
    assert found.first_s[0] == 1.5
    np.testing.assert_allclose(found.decode_s[0], 1.5 + 0.1 + 0.05)
    np.testing.assert_allclose(found.last_s[0], found.decode_s[0] + 3 * 0.25)
    assert found.gaps.sum() == 3
    np.testing.assert_allclose(found.busy_s, [0.5, 0.75])


def test_steps_taken_together_sum_to_the_steps_one_by_one(monkeypatch):
    """Step times that are linear in the context: the middle one times their number is their sum."""
    service = inputs(
        requests([0.0], [100], [1000]),
        workers({"role": 2, "max_tokens": 512}),
        (table(per_context=1e-6),),
    )
    together = Simulation(service).run()
    monkeypatch.setattr("cmjax.serving.engine.scheduler.MOST_STEPS", 1)
    apart = Simulation(service).run()
    np.testing.assert_allclose(together.last_s, apart.last_s, rtol=1e-9)
    assert together.events < apart.events / 10


def test_a_full_worker_preempts_the_last_one_and_computes_it_again():
    service = inputs(
        requests([0.0, 0.0], [100, 100], [100, 100]),
        workers({"role": 2, "max_tokens": 512, "capacity": 301 << FIXED}),
        (table(),),
    )
    found = run(service)
    assert found.retries.tolist() == [0, 1]
    assert (found.ended == COMPLETED).all()
    assert found.last_s[1] > found.last_s[0]
    assert found.peak_kv[0] <= 301 << FIXED


def test_a_lost_decode_worker_costs_its_requests_a_second_prefill():
    """The answer so far is computed again as part of the prompt, and the first token stays."""
    of = requests([0.0], [100], [200])
    by = workers({}, {"role": DECODE}, {"role": DECODE})
    kept = run(inputs(of, by, (table(),)))
    lost = run(inputs(
        of, by, (table(),),
        loss_s=np.array([0.5]), loss_worker=np.array([1], np.int32), back_s=np.array([1e9]),
    ))  # fmt: skip
    assert lost.first_s[0] == kept.first_s[0]
    assert lost.retries[0] == 1 and lost.decode_worker[0] == 2 and lost.ended[0] == COMPLETED
    assert kept.last_s[0] < lost.last_s[0] < kept.last_s[0] + 0.5


def test_a_request_that_no_worker_comes_back_for_is_unserved():
    found = run(inputs(
        requests([0.0, 2.0], [100, 100], [1, 1]), workers({}), (table(),),
        loss_s=np.array([1.0]), loss_worker=np.array([0], np.int32), back_s=np.array([np.inf]),
    ))  # fmt: skip
    assert found.ended.tolist() == [COMPLETED, 0]


def test_a_pause_stops_steps_once_in_its_time():
    of = requests([0.0], [10], [101])
    free = run(inputs(of, workers({"role": 2}), (table(per_context=0),)))
    paused = run(inputs(
        of, workers({"role": 2, "pause_every_s": 0.5, "pause_s": 0.2}), (table(per_context=0),)
    ))  # fmt: skip
    extra = paused.last_s[0] - free.last_s[0]
    assert round(extra / 0.2, 6) == int(paused.last_s[0] / 0.5)


@pytest.mark.parametrize("rank, link", [(0, 0), (9, 0), (10, 1), (319, 31)])
def test_decode_ranks_pull_from_prefill_ranks_as_the_paper_maps_them(rank, link):
    """tp_pre 32, dp_dec 320: r = 32, g = 10, so that ranks 0-9 pull from prefill rank 0."""
    assert rank * 32 // 320 == link
    simulation = Simulation(inputs(
        requests(np.zeros(320), np.full(320, 10), np.full(320, 2)),
        workers({}, {"role": DECODE, "ranks": 320}), (table(),), handover_s=1.0, links=32,
    ))  # fmt: skip
    found = simulation.run()
    ended = np.sort(found.decode_s - found.first_s)  # ten in a row on each of 32 links
    np.testing.assert_allclose(ended.reshape(10, 32), np.arange(10, 101, 10)[:, None] * np.ones(32))


@pytest.mark.parametrize("gap_s", [1e3, 1e5, 1e9, 1e12])
def test_a_run_of_any_length_has_so_many_bins_at_most(gap_s):
    """Queues are recorded in bins that widen, so that memory does not follow the clock."""
    twice = requests([gap_s / 3, gap_s], [10, 10], [5, 5])
    found = run(inputs(twice, workers({"role": COLOCATED}), (table(),), bin_s=1e-3))
    assert len(found.gauges) <= MOST_BINS
    assert len(found.gauges) * found.bin_s >= gap_s
    np.testing.assert_allclose(found.gauges[:, 1].sum(), found.busy_s.sum(), rtol=1e-2)


def test_hits_of_a_cache_do_not_depend_on_the_loop():
    blocks = [[0, 1, 2], [0, 1, 3], [0, 4], [0, 1, 2]]
    prompt = [3, 3, 2, 3]
    given = inputs(
        requests(np.arange(4.0), prompt, [1] * 4, blocks=blocks), workers({}), (table(),)
    )
    for memory, expected in ((10, [0, 2, 1, 3]), (3, [0, 2, 1, 1]), (0, [0, 0, 0, 0])):
        cache = dataclasses.replace(
            given.cache, stores=1, blocks=5, block_tokens=1, node=np.zeros(5, np.int32),
            memory=np.array([memory]), disk=np.array([0]),
        )  # fmt: skip
        assert hits(dataclasses.replace(given, cache=cache)).tolist() == expected
