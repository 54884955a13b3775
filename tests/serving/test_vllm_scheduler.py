"""The colocated engine against vLLM's scheduler, step by step and block by block."""

import numpy as np
import pytest

from cmjax.hardware import load_machine
from cmjax.serving import generate, measured_engine, serve
from cmjax.serving.calibrate import replayed
from cmjax.serving.engine.table import Lookup
from studies.serving import RUNS, engine_runs
from tests.serving.scenarios import table
from tests.serving.vllm_scheduler import replay


@pytest.mark.parametrize(
    "kv_tokens, batch, least", [(8_000, 64, 20), (16_000, 32, 1), (200_000, 24, 0)]
)
def test_the_engine_schedules_as_vllm_does(kv_tokens, batch, least):
    """With memory that is always full, now and then, and never; the engine's half a block per
    request for numbered ones, and its steps taken together, move means by less than a percent."""
    trace = generate(
        "gamma", requests=200, rate=8.0, prompt=700, prompt_cv=0.8, output=150, output_cv=0.5,
        seed=3,
    )  # fmt: skip
    times = table(base=0.02, per_token=5e-5, per_request=2e-4, per_context=1e-7)
    first, last, preempted = replay(
        trace, Lookup(times), batch=batch, tokens=2048, kv_tokens=kv_tokens, page=16
    )
    service, steps = measured_engine(times, batch=batch, tokens=2048, kv_tokens=kv_tokens, page=16)
    found = serve(trace, service, times=steps)
    assert preempted.sum() >= least
    assert found.outputs.retries.sum() == pytest.approx(preempted.sum(), rel=0.1, abs=2)
    tpot = (last - first) / np.maximum(trace.output - 1, 1)
    assert found.latencies.ttft.mean() == pytest.approx((first - trace.arrival_s).mean(), rel=0.01)
    assert np.nanmean(found.latencies.tpot) == pytest.approx(
        tpot[trace.output > 1].mean(), rel=0.01
    )


@pytest.mark.parametrize("run", range(3))
def test_the_engine_schedules_measured_runs_as_vllm_does(data, run):
    """With the kernel times of their cards: mean and percentiles of TTFT and TPOT within 0.7 %, so
    that what both miss of the measured ones is not for the engine to mend."""
    assert (data / "serving_vllm_measured").is_dir()
    measured, (*_, batch, kv_tokens, _) = engine_runs()[run], RUNS[run]
    trace, times = measured.run.trace, measured.times.tables["colocated"]
    first, last, _ = replay(
        trace, Lookup(times), batch=batch, tokens=2048, kv_tokens=(kv_tokens or 10**7) - 16, page=16
    )
    machine = load_machine("cloudmatrix384")
    found = replayed(measured.run, measured.service, measured.times, machine).latencies
    gaps = np.where(trace.output > 1, trace.output - 1, np.nan)
    for one, other in ((found.ttft, first - trace.arrival_s), (found.tpot, (last - first) / gaps)):
        assert np.nanmean(one) == pytest.approx(np.nanmean(other), rel=0.007)
        for p in (90, 99):
            assert np.nanpercentile(one, p) == pytest.approx(np.nanpercentile(other, p), rel=0.007)
