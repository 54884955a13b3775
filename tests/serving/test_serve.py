"""The face: a trace through the paper's instances, its numbers, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import cmjax
from cmjax.hardware import load_machine
from cmjax.serving import (
    ColocatedPool,
    ContextCache,
    DecodePool,
    Loss,
    PrefillPool,
    Service,
    generate,
    paper_service,
    read_service,
    serve,
)
from cmjax.serving.metrics import gaps_ms
from cmjax.serving.step_times import step_spread
from cmjax.serving.verdict import verdict

SMALL = Service(
    model="tiny", prefill=PrefillPool(npus=4, instances=2, tokens=8192),
    decode=DecodePool(npus=4, batch=8),
    cache=ContextCache(blocks=200),
)  # fmt: skip


def small(trace=None, service=SMALL, **options):
    trace = trace or generate(requests=200, rate=20.0, prompt=2048, output=40, reuse=0.5, trees=2)
    return serve(trace, service, **options)


@pytest.fixture(scope="module")
def found():
    return small(slo_ttft_ms=200, slo_tpot_ms=20)


def test_the_result_has_the_numbers_that_people_ask_for(found):
    result = found.to_dict()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    keys = (
        "requests completed rejected ttft_ms tpot_ms output_tokens_per_s tokens_per_s_per_npu "
        "goodput_requests_per_s slo_attainment cache_hit_blocks cache_hit_tokens verdict wall_s"
    )
    assert set(keys.split()) <= set(result)
    for key in ("ttft_ms", "tpot_ms"):
        assert {"mean", "p50", "p90", "p99"} <= set(result[key])
    assert result["completed"] == result["requests"] == 200
    assert result["output_tokens_per_s"] == pytest.approx(200 * 40 / result["makespan_s"])
    assert result["tokens_per_s_per_npu"] == pytest.approx(result["output_tokens_per_s"] / 12)


def test_the_metrics_are_those_of_the_requests(found, tmp_path):
    path = tmp_path / "requests.csv"
    found.write_requests(path)
    rows = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")
    result = found.to_dict()
    ttft = rows["first_token_s"] - rows["arrival_s"]
    tpot = (rows["last_token_s"] - rows["first_token_s"]) / (rows["output_tokens"] - 1)
    assert result["ttft_ms"]["p90"] == pytest.approx(np.percentile(ttft, 90) * 1e3)
    assert result["tpot_ms"]["mean"] == pytest.approx(tpot.mean() * 1e3)
    kept = (ttft <= 0.2) & (tpot <= 0.02)
    assert result["slo_attainment"] == pytest.approx(kept.mean())
    assert result["cache_hit_tokens"] == pytest.approx(
        rows["hit_tokens"].sum() / rows["prompt_tokens"].sum()
    )


def test_parquet_holds_what_csv_holds(found, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    found.write_requests(tmp_path / "r.parquet")
    table = parquet.read_table(tmp_path / "r.parquet")
    np.testing.assert_array_equal(table["first_token_s"].to_numpy(), found.outputs.first_s)


def test_gaps_between_tokens_sum_to_the_time_of_decode(found):
    """Every request's gaps, the wait for a place included, add up to last - first."""
    total = float((found.outputs.last_s - found.outputs.first_s).sum())
    counted = gaps_ms(found.outputs.gaps)
    assert counted is not None
    assert counted["mean"] * 1e-3 * found.outputs.gaps.sum() == pytest.approx(total, rel=5e-3)


def test_the_same_seed_gives_the_same_bits_in_another_process(found):
    code = (
        "from tests.serving.test_serve import small; import hashlib\n"
        "o = small(slo_ttft_ms=200, slo_tpot_ms=20).outputs\n"
        "print(hashlib.sha256(o.last_s.tobytes() + o.gauges.tobytes()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"CMJAX_NATIVE": native, "PYTHONHASHSEED": seed},
        ).stdout
        for native, seed in (("auto", "1"), ("off", "2"))
    ]  # fmt: skip
    assert runs[0] == runs[1]
    other = small(slo_ttft_ms=200, slo_tpot_ms=20, seed=1)
    assert (other.outputs.last_s != found.outputs.last_s).any()


def test_the_python_loop_says_that_it_is_slow(monkeypatch):
    from cmjax.serving.engine import native

    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.warns(UserWarning, match="serving runs in Python"):
        slow = small(generate(requests=2001, rate=100.0, prompt=64, output=2))
    assert slow.engine == "python"


def test_more_uncertainty_is_a_wider_interval():
    result = small(uncertainty=0.2).to_dict()
    low, high = result["interval"]["tpot_ms"]["mean"]
    assert low < result["tpot_ms"]["mean"] < high
    assert high / low == pytest.approx(1.2 / 0.8, rel=0.2)


def test_a_service_is_as_sure_as_the_predictions_of_its_steps():
    found = small()
    interval = found.to_dict()["interval"]
    decode = cmjax.predict(
        "tiny", phase="decode", npus=4, batch=4, context=4096, microbatches=1
    ).interval["step_ms"]
    low, high = interval["tpot_ms"]["mean"]
    assert high / low == pytest.approx(decode[1] / decode[0], rel=0.2)
    assert low < found.to_dict()["tpot_ms"]["mean"] < high
    assert "interval" not in small(uncertainty=0.0).to_dict()
    assert "interval" not in small(times=found.times).to_dict()  # who measured them knows


@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("tokens", [1, 1000])
def test_intervals_ask_nothing_of_batches_and_steps(batch, tokens):
    service = dataclasses.replace(
        SMALL, prefill=PrefillPool(npus=4, tokens=tokens), decode=DecodePool(npus=4, batch=batch)
    )
    factors = step_spread(service, cmjax.load_machine("cloudmatrix384"))
    assert factors.keys() == {"prefill", "decode"} and min(factors.values()) > 1


@pytest.mark.parametrize("rate, expected", [(2.0, "stable"), (5000.0, "overloaded")])
def test_the_verdict_tells_what_keeps_up_from_what_does_not(rate, expected):
    trace = generate(requests=2000, rate=rate, prompt=8192, output=4)
    assert small(trace).verdict == expected


def test_a_queue_that_fills_batches_is_a_backlog():
    """A burst is worked off in full steps, each of which takes many times what a prompt alone does;
    measured by those, nobody would wait long."""
    trace = generate(requests=1000, rate=20.0, prompt=8192, output=4)
    burst = dataclasses.replace(trace, arrival_s=np.maximum(trace.arrival_s, 35.0))
    wide = dataclasses.replace(SMALL, prefill=PrefillPool(npus=4, instances=2, tokens=2**18))
    assert small(trace, wide).verdict == "stable"
    found = small(burst, wide)
    among_others = np.median(found.outputs.first_s - found.outputs.scheduled_s)
    assert np.percentile(found.latencies.wait, 90) < 10 * among_others
    assert found.verdict == "backlogged"


def test_refusing_requests_is_no_way_to_keep_up():
    trace = generate(requests=2000, rate=5000.0, prompt=8192, output=4)
    early = small(trace, dataclasses.replace(SMALL, admission="early"), slo_ttft_ms=100)
    result = early.to_dict()
    assert result["rejected"] > 0 and early.verdict == "overloaded"
    assert result["requests"] == result["completed"] + result["rejected"]
    assert result["slo_attainment"] < result["completed"] / result["requests"] + 1e-9


@pytest.mark.parametrize(
    "load, expected", [(0.3, "stable"), (0.97, "backlogged"), (1.3, "overloaded")]
)
def test_the_verdict_of_a_single_server(load, expected):
    from cmjax.serving.metrics import Latencies

    rng, count = np.random.default_rng(0), 20_000
    arrival = np.cumsum(rng.exponential(1 / load, count))
    service = rng.exponential(1.0, count)
    start, free = np.empty(count), 0.0
    for i in range(count):
        start[i] = free = max(free, arrival[i])
        free += service[i]
    found = Latencies(
        ttft=start + service - arrival, tpot=np.full(count, np.nan), e2e=start + service - arrival,
        wait=start - arrival, completed=np.ones(count, bool),
    )  # fmt: skip
    assert verdict(arrival, float(np.median(service)), found) == expected


def test_a_cache_shortens_prompts_and_a_slower_plane_fetches_later():
    trace = generate(requests=300, rate=5.0, prompt=16384, output=4, reuse=0.9, trees=1, branches=1)
    ub, vpc, none = (
        small(trace, dataclasses.replace(SMALL, cache=cache)).to_dict()
        for cache in (ContextCache(), ContextCache(plane="vpc"), None)
    )
    assert ub["cache_hit_tokens"] == pytest.approx(0.9, abs=0.03) and none["cache_hit_tokens"] == 0
    assert ub["ttft_ms"]["mean"] < vpc["ttft_ms"]["mean"] < none["ttft_ms"]["mean"]


def test_cache_aware_routing_finds_more_in_caches_of_instances():
    trace = generate(requests=400, rate=20.0, prompt=8192, output=2, reuse=0.9, trees=6, branches=1)
    cache = ContextCache(scope="instance", blocks=4 * 60)
    hits = {
        router: small(trace, dataclasses.replace(
            SMALL, prefill=PrefillPool(npus=4, instances=4), cache=cache, router=router
        )).to_dict()["cache_hit_tokens"]
        for router in ("round-robin", "cache-aware")
    }  # fmt: skip
    assert hits["cache-aware"] > hits["round-robin"] + 0.05


def test_a_lost_instance_is_retried_and_nothing_is_lost():
    lost = dataclasses.replace(SMALL, losses=(Loss(pool="decode", at_s=3.0, back_s=5.0),))
    result = small(service=lost).to_dict()
    assert result["completed"] == 200 and result["retries"] > 0


def test_a_closed_loop_keeps_littles_law():
    trace = generate(requests=3000, prompt=512, prompt_cv=0.5, output=20, output_cv=0.5)
    result = small(trace, clients=12, think_s=0.05).to_dict()
    in_system = result["completed_requests_per_s"] * (result["e2e_ms"]["mean"] * 1e-3 + 0.05)
    assert in_system == pytest.approx(12, rel=0.02)


def test_colocated_instances_serve_too():
    service = Service(model="tiny", colocated=ColocatedPool(npus=4, instances=2, tokens=2048))
    result = small(service=service).to_dict()
    assert result["completed"] == 200 and set(result["utilization"]) == {"colocated"}


def test_the_perfetto_trace_shows_every_step_of_every_instance(tmp_path):
    result = small(record=10**6)
    result.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    busy = np.zeros(3)
    np.add.at(busy, [event["tid"] for event in spans], [event["dur"] * 1e-6 for event in spans])
    np.testing.assert_allclose(busy, result.outputs.busy_s, rtol=1e-9)


def test_the_paper_fills_the_supernode():
    service = paper_service(384)
    assert (service.prefill.instances, service.decode.instances) == (14, 1)
    assert paper_service(256).prefill.instances == 6


def test_a_service_is_read_from_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'model = "tiny"\nrouter = "least-loaded"\n[prefill]\ninstances = 2\nnpus = 4\n'
        "tokens = 8192\n"
        "[decode]\nnpus = 4\nbatch = 8\n[cache]\nblocks = 200\n"
        '[[losses]]\npool = "decode"\nat_s = 1\nback_s = 2.5\n'
    )
    expected = dataclasses.replace(
        SMALL, name="mine", router="least-loaded",
        losses=(Loss(pool="decode", at_s=1, back_s=2.5),),
    )  # fmt: skip
    assert read_service(path) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("[prefill", "not valid TOML"),
        ("modle = 'tiny'", "unknown key 'modle'; it takes model"),
        ("[prefill]\ninstances = 'two'", "instances must be a whole number, got 'two'"),
        ("[prefill]\ninstances = true", "instances must be a whole number"),
        ("prefill = 3", "a table is needed"),
        ("router = 'random'", "router must be 'any-idle' or"),
        ("[[losses]]\nat_s = 1", "pool is needed"),
    ],
)
def test_a_file_that_describes_no_service_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_service(path)


@pytest.mark.parametrize(
    "service, message",
    [
        (dataclasses.replace(SMALL, decode=None), "it has prefill"),
        (
            dataclasses.replace(SMALL, prefill=PrefillPool(instances=30)),
            "484 NPUs .* more than the 384",
        ),
        (
            dataclasses.replace(SMALL, prefill=PrefillPool(npus=0)),
            "prefill.npus must be at least 1",
        ),
        (dataclasses.replace(SMALL, acceptance=2.0), "acceptance must lie in 0..1"),
        (
            dataclasses.replace(SMALL, engine="sglang"),
            "engine 'sglang' is not known on cloudmatrix384; known: cloudmatrix-infer, ",
        ),
        (dataclasses.replace(SMALL, losses=(Loss(pool="decode", instance=3),)), "no instance 3"),
        (dataclasses.replace(SMALL, memory_fraction=1e-9), "prefill: the weights of tiny take"),
    ],
)
def test_a_service_that_makes_no_sense_is_refused(service, message):
    with pytest.raises(ValueError, match=message):
        small(service=service)


def test_a_serving_engine_takes_its_host_time_in_every_step():
    machine = load_machine("cloudmatrix384")
    engines = "cloudmatrix-infer", "vllm-ascend"  # whose kernels take the same time for a copy
    alone = generate(requests=20, rate=0.1, prompt=2048, output=40)
    one, other = (
        small(alone, dataclasses.replace(SMALL, mtp=False, engine=name)).to_dict()
        for name in engines
    )
    host_ms = [machine.running(name).host_s(0) * 1e3 for name in engines]
    more = other["tpot_ms"]["mean"] - one["tpot_ms"]["mean"]
    assert more == pytest.approx(host_ms[1] - host_ms[0], rel=1e-3)


def test_a_request_that_no_instance_can_hold_is_refused_with_its_number():
    trace = generate(requests=3, prompt=10**10, output=4)
    with pytest.raises(
        ValueError, match=r"holds the keys and values of [\d,]+ tokens, and request 1"
    ):
        small(trace)


@pytest.mark.parametrize("slo", ["slo_ttft_ms", "slo_tpot_ms"])
def test_an_slo_that_nobody_keeps_is_refused_with_the_best(slo):
    with pytest.raises(
        ValueError, match=r"cannot be met: the shortest request .* alone takes [\d.]+ ms"
    ):
        small(**{slo: 0.001})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rate_scale": 0.0}, "rate-scale must be positive"),
        ({"cache_blocks": -1}, "cache-blocks must be at least 0"),
        ({"slo_ttft_ms": -1.0}, "slo-ttft-ms must be positive"),
        ({"clients": -1}, "clients must be at least 0"),
        ({"routr": "x"}, "unknown option 'routr'"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_fewer_npus_than_the_papers_instances_are_refused():
    with pytest.raises(ValueError, match="use 176 or more"):
        cmjax.serve("poisson:requests=1", npus=100)


def test_interpolated_step_times_are_close_to_priced_ones():
    times = small().times
    assert 0 < times.mean_error < 0.005 and times.worst_error < 0.03
