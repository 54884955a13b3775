"""The plan: the fluid model's gradient, and what the simulator confirms; on processes and
clusters."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from cmjax.serving import ContextCache, Service, generate
from cmjax.serving.engine.table import Lookup, Table
from cmjax.serving.planner import Demand, Fluid, plan, propose
from cmjax.sweep import executor_of, run_all
from tests.serving.scenarios import table

TRACE = generate(requests=300, rate=10.0, prompt=4096, prompt_cv=0.5, output=64, output_cv=0.5)
BASE = Service(model="tiny", cache=ContextCache())


def fluid(slo_tpot_s=np.inf, kv_tokens=0.0) -> Fluid:
    axis, one = np.array([1.0, 100.0]), np.zeros(1)
    prefill = Table(tokens=np.array([0.0, 1000.0]), length=one, requests=one, context=one,
                    batch_s=np.array([0.1, 1.1]).reshape(2, 1, 1, 1))  # fmt: skip
    decode = Table(tokens=one, length=one, requests=axis, context=one,
                   batch_s=np.array([0.011, 0.11]).reshape(1, 1, 2, 1))  # fmt: skip
    demand = Demand(uncached_tokens=100, length=100, prompt_tokens=100, steps=50, context=100)
    return Fluid(
        prefill=prefill, decode=decode, prefill_npus=2, decode_npus=4, dies_per_npu=2,
        ranks_per_npu=2, prefill_tokens=900, kv_tokens=kv_tokens, tokens_per_step=1.0,
        handover_token_s=1e-6, slo_tpot_s=slo_tpot_s, demand=demand,
    )  # fmt: skip


def test_the_limits_are_the_flows_by_hand():
    found = fluid().limits(20.0, 40.0, 10.0)
    assert float(found.prefill) == pytest.approx(20 / 2 * 900 / 1.0 / 100)
    assert float(found.rdma) == pytest.approx(20 * 2 / 1e-4)
    assert float(found.decode) == pytest.approx(80 * 10 / (0.02 * 50))


def test_the_gradient_of_the_rate_is_its_slope():
    model = fluid(slo_tpot_s=0.019)
    at = (20.0, 13.0, 10.0)
    slopes = jax.grad(model.served, argnums=(0, 1, 2))(*at)
    for i, slope in enumerate(slopes):
        up, down = ([*at[:i], at[i] + sign * 1e-2, *at[i + 1 :]] for sign in (1, -1))
        measured = (float(model.served(*up)) - float(model.served(*down))) / 2e-2
        assert float(slope) == pytest.approx(measured, rel=2e-2, abs=1e-3)


def test_the_proposal_balances_both_pools_within_the_slo():
    """At 10 requests per rank a step takes 20 ms; then NPUs split so that both rates are equal."""
    model = fluid(slo_tpot_s=0.02)
    found = propose(model, 100)
    assert found.per_rank == pytest.approx(10, rel=0.05)
    assert found.prefill_npus + found.decode_npus == pytest.approx(100)
    limits = found.limits
    assert float(limits.prefill) == pytest.approx(float(limits.decode), rel=0.1)
    grid = max(float(min(model.limits(p, 100.0 - p, 10.0))) for p in np.linspace(1, 99, 197))
    assert found.rate == pytest.approx(grid, rel=0.05)


def test_memory_bounds_the_batch():
    assert propose(fluid(kv_tokens=8 * 100 * 3.0), 100).per_rank == pytest.approx(3, rel=0.02)


def test_the_fluid_model_looks_step_times_up_as_the_simulator_does():
    rng = np.random.default_rng(0)
    step = table()
    one = np.zeros(1)
    decode = dataclasses.replace(step, tokens=one, length=one, batch_s=step.batch_s[:1, :1])
    for _ in range(20):
        n, c = rng.uniform(0, 300), rng.uniform(0, 30_000)
        model = dataclasses.replace(
            fluid(), decode=decode, demand=dataclasses.replace(fluid().demand, context=c)
        )
        expected = Lookup(decode).step_s(0, 0.0, n, c, 0, 0)
        assert float(model.decode_step_s(n)) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def planned():
    with executor_of(workers=1) as executor:
        return small_plan(executor)


def small_plan(executor):
    return plan(
        TRACE, npus=24, slo_ttft_ms=100, slo_tpot_ms=10, service=BASE, prefill_npus=(4,),
        decode_npus=(4, 8), executor=executor,
    )  # fmt: skip


def test_the_plan_keeps_the_slo_and_no_other_that_was_tried_serves_more(planned):
    best = planned.best
    assert best.attainment >= 0.9 and best.service.npus <= 24
    assert all(f.goodput_requests_per_s <= best.goodput_requests_per_s for f in planned.tried)
    assert planned.bound_by in ("prefill", "decode", "rdma", "cache")
    front = planned.pareto()
    assert all(a.tpot_p50_ms < b.tpot_p50_ms and a.output_tokens_per_s < b.output_tokens_per_s
               for a, b in itertools.pairwise(front))  # fmt: skip


def test_no_plan_serves_more_than_the_flow_that_bounds_it(planned):
    """A short trace is repeated, so that a queue that only grows does not pass for throughput."""
    flow = min(planned.proposal.limits.prefill, planned.proposal.limits.decode)
    assert 0.3 * flow < planned.best.goodput_requests_per_s < 1.05 * flow


def test_a_cache_is_as_small_as_the_goodput_allows():
    trace = generate(requests=300, rate=10.0, prompt=4096, output=16, reuse=0.8, trees=8)
    with executor_of(workers=1) as executor:
        found = plan(
            trace, npus=12, slo_ttft_ms=100, service=BASE, prefill_npus=(4,), decode_npus=(4,),
            executor=executor,
        )  # fmt: skip
    sizes = found.cache
    assert sizes[0].blocks <= trace.blocks and sizes[-1].blocks == 0
    assert all(a.blocks > b.blocks and a.gb_per_node > b.gb_per_node
               for a, b in itertools.pairwise(sizes))  # fmt: skip
    assert sizes[0].hit_tokens > 0.3 and sizes[-1].hit_tokens == 0
    assert sizes[-1].goodput_requests_per_s < 0.8 * sizes[0].goodput_requests_per_s
    enough = found.to_dict()["cache_enough"]
    assert enough["goodput_requests_per_s"] >= 0.99 * sizes[0].goodput_requests_per_s
    assert 0 < enough["blocks"] <= sizes[0].blocks


def test_without_prefixes_there_is_no_cache_to_size(planned):
    assert planned.cache == [] and planned.to_dict()["cache_enough"] is None


@pytest.mark.slow
def test_the_plan_is_the_same_on_a_cluster_of_two_workers(planned):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, protocol="tcp",
            host="127.0.0.1", silence_logs=50,
        ) as cluster,
        executor_of(cluster.scheduler_address) as executor,
    ):  # fmt: skip
        assert run_all(_double, [3, 1, 2], executor) == [6, 2, 4]
        assert small_plan(executor).to_dict() == planned.to_dict()


def _double(x: int) -> int:
    return 2 * x


@pytest.mark.slow
def test_the_plan_is_the_same_with_two_processes(planned):
    with executor_of(workers=2) as executor:
        assert small_plan(executor).to_dict() == planned.to_dict()


def test_a_scheduler_that_nobody_answers_at_is_named():
    pytest.importorskip("distributed")
    with (
        pytest.raises(ValueError, match=r"scheduler tcp://127.0.0.1:1: nobody answers within 5 s"),
        executor_of("tcp://127.0.0.1:1"),
    ):
        pass


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "plan needs an SLO"),
        ({"slo_tpot_ms": 10, "target": 2.0}, "target must lie in 0..1"),
        ({"slo_tpot_ms": 10, "npus": 1000}, "cloudmatrix384 has 384"),
        ({"slo_tpot_ms": 10, "npus": 8}, "npus 8 holds no pair of instances; the smallest is"),
        ({"slo_ttft_ms": 0.001}, "slo-ttft-ms 0.001 cannot be met: .* alone takes"),
        ({"slo_tpot_ms": 0.001}, "slo-tpot-ms 0.001 cannot be met: .* alone takes"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options, message):
    with executor_of(workers=1) as executor, pytest.raises(ValueError, match=message):
        plan(
            TRACE, **({"npus": 24} | options), service=BASE, prefill_npus=(4,), decode_npus=(8,),
            executor=executor,
        )  # fmt: skip


def test_a_trace_without_a_rate_cannot_be_planned_for():
    with pytest.raises(ValueError, match=r"all requests arrive at once, .* give a rate"):
        plan(TRACE.first(1), slo_tpot_ms=10)


def test_fewer_than_one_worker_is_refused():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"), executor_of(None, 0):
        pass
