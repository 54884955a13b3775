"""The serving simulator against what is known, and what it says of the supernode.

    python -m studies.serving [--parts cache engine queues pools slo reuse overload]

*cache*: blocks that a cache of a size finds in Mooncake's conversations, beside the shares
published with the trace. *engine*: three runs of vLLM, simulated with the kernel times of their own
cards, as they are and with the engine's constants fitted to the first requests of the run, to all
of it and to another run, beside the errors that LLMServingSim published on the same runs.
*queues*: long runs against closed forms. *pools*: predictions; separate pools against colocated
instances, the plane of the cache, the loss of an instance. *slo*: what the pools serve within one.
*reuse*: prefill with a part of every prompt in the cache. *overload*: admission control, and how
the loads of the two pools swing.

What must hold in every run (each request ends once, no token before its prefill, memory within
bounds, time forward) is a property of `tests/serving/test_engine.py`.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from cmjax.console import terminal
from cmjax.hardware import load_machine
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.report.tables import simple_table
from cmjax.serving import (
    ColocatedPool,
    ContextCache,
    Loss,
    Service,
    ServingResult,
    StepTimes,
    Trace,
    calibrate,
    generate,
    measured_engine,
    paper_service,
    read_measured,
    read_profile,
    read_trace,
    serve,
)
from cmjax.serving.assemble import Replay
from cmjax.serving.cache_curve import cache_hits
from cmjax.serving.calibrate import EngineConstants, MeasuredRun, compare, replayed
from cmjax.serving.engine.table import Table as StepTable
from cmjax.serving.planner.judge import Judged, Question, judge
from cmjax.serving.step_times import price_service

DATA = Path(os.environ.get("CMJAX_DATA", Path(__file__).parents[1] / "../shared/data"))
MOONCAKE = "serving_mooncake_conversation/conversation_trace.jsonl.gz"
Part = Literal["cache", "engine", "queues", "pools", "slo", "reuse", "overload"]
PUBLISHED_HITS = {1_000: 4.5, 3_000: 6.5, 10_000: 21.1, 30_000: 32.6, 50_000: 35.5, 10**6: 36.6}
"""Blocks of the cache, per cent of blocks found; the last one never evicts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    parts: tuple[Part, ...] = ("cache", "engine", "queues", "pools", "slo", "reuse", "overload")
    """Which of them."""


@dataclasses.dataclass(frozen=True)
class EngineRun:
    """One measured run of an engine and what describes the engine."""

    name: str
    run: MeasuredRun
    service: Service
    times: StepTimes
    published: dict[str, float]
    exchanged_bytes: float
    """That a card sends for a token, where two share a layer."""

    @staticmethod
    def read(
        name: str, folder: str, profile: str, layers: int, batch: int, kv: int, hidden: int
    ) -> "EngineRun":
        path = DATA / "serving_vllm_measured" / folder
        table = read_profile(path / profile, layers=layers)
        service, times = measured_engine(table, batch=batch, kv_tokens=kv)
        run = read_measured(path / "requests.jsonl")
        # Two all-reduces a layer of 16-bit values; in a ring of two a card sends each value once.
        return EngineRun(name, run, service, times, _published(path), 2 * layers * hidden * 2)


RUNS = (
    ("4090 Llama-3.1-8B", "RTX4090_Llama-3.1-8B", "kernel_profile_tp1", 32, 256, 41_408, 0),
    ("PRO 6000 Llama-3.1-8B", "RTXPRO6000_Llama-3.1-8B", "kernel_profile_tp1", 32, 128, 0, 0),
    ("PRO 6000 x 2 Qwen3-32B", "RTXPRO6000_Qwen3-32B", "kernel_profile_tp2", 64, 128, 0, 5120),
)
PCIE_BYTES_PER_S = 32e9 * 16 / 8 * 128 / 130
"""Of PCI Express 5.0 x16, the link between RTX PRO 6000 cards, one way: its datasheet's 63 GB/s."""
STEP_TOKENS = 2048  # of the measured runs
FIRST = 60
"""Requests of a run that constants are fitted to, of 300; the others are predicted."""
KEYS = ("ttft_mean_ms", "ttft_p90_ms", "ttft_p99_ms", "tpot_mean_ms", "tpot_p90_ms", "tpot_p99_ms")


def main(study: Study) -> None:
    console = terminal()
    parts = {
        "cache": cache_table, "engine": engine_table, "queues": queue_table,
        "pools": pool_table, "slo": slo_table, "reuse": reuse_table, "overload": overload_table,
    }  # fmt: skip
    for part in study.parts:
        console.print(parts[part]())


def conversations() -> Trace:
    """Mooncake's hour."""
    return read_trace(DATA / MOONCAKE)


def cache_table() -> Table:
    """Blocks found, beside the published shares."""
    table = simple_table("Blocks found in the cache, %", "blocks held", "simulated", "published")
    trace = conversations()
    for blocks, published in PUBLISHED_HITS.items():
        found = 100 * cache_hits(trace, blocks).blocks
        held = "without eviction" if blocks >= trace.blocks else f"{blocks:,}"
        table.add_row(held, f"{found:.2f}", f"{published}")
    return table


def engine_runs() -> list[EngineRun]:
    """The three runs."""
    return [EngineRun.read(*run) for run in RUNS]


def beyond_a_step(folder: str, batch: int) -> list[tuple[int, ...]]:
    """Prompts of a measured run that one step finished although they are longer than a step.

    They were first scheduled together and answered together, and the first of them fits into one
    step; so the engine found a part of them in its prefix cache. The run's file has no token ids to
    replay that with.
    """
    together: dict[tuple[float, float], list[tuple[int, int]]] = {}
    lines = (DATA / "serving_vllm_measured" / folder / "requests.jsonl").read_text().splitlines()
    for number, of in enumerate(map(json.loads, lines)):
        key = round(of["scheduled_ts"], 3), round(of["first_token_ts"], 4)
        together.setdefault(key, []).append((number, of["input_toks"]))
    found = [group for group in together.values() if group[0][1] <= STEP_TOKENS - batch]
    return [
        tuple(n for n, _ in group)
        for group in found
        if sum(size for _, size in group) > STEP_TOKENS
    ]


def engine_errors(runs: list[EngineRun]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(run, constants, relative error by key): without constants, with those of its first requests,
    and with those of every run."""
    machine = load_machine("cloudmatrix384")  # nothing of it enters: all times are measured
    fitted = {r.name: calibrate(r.run, r.service, r.times, machine) for r in runs}
    for r in runs:
        first = calibrate(r.run, r.service, r.times, machine, requests=FIRST)
        choices: dict[str, EngineConstants | None] = {"kernel times alone": None}
        if r.exchanged_bytes:
            exchange = EngineConstants(token_s=r.exchanged_bytes / PCIE_BYTES_PER_S)
            choices["and exchange at the rate of PCIe"] = exchange
        choices[f"fitted to its first {FIRST} requests"] = first
        choices |= {
            "fitted to all of it" if name == r.name else f"fitted to {name}": constants
            for name, constants in fitted.items()
        }
        for what, constants in choices.items():
            found = compare(r.run, replayed(r.run, r.service, r.times, machine, constants))
            yield r.name, what, {row.key: row.error for row in found}


def engine_table() -> Table:
    """Errors of TTFT and TPOT, per cent."""
    runs = engine_runs()
    names = [key.removesuffix("_ms").replace("_", " ") for key in KEYS]
    table = simple_table("Errors against measured vLLM 0.19 runs, %", "run", "constants", *names)
    published = {r.name: r.published for r in runs}
    for name, what, errors in engine_errors(runs):
        if what == "kernel times alone":
            row = [f"{published[name][key]:+.1f}" for key in KEYS]
            table.add_row(name, "LLMServingSim, published", *row, style="dim")
        table.add_row(name, what, *(f"{100 * errors[key]:+.1f}" for key in KEYS))
    groups = [len(beyond_a_step(folder, batch)) for _, folder, _, _, batch, *_ in RUNS]
    table.caption = (
        "Groups of prompts that one step finished though they are longer than it, so that a part "
        f"was cached: {', '.join(map(str, groups))}."
    )
    return table


def queue_table(requests: int = 2_000_000) -> Table:
    """Mean seconds in the system, service of mean 1 s."""
    table = simple_table("Mean time in the system, s", "queue", "simulated", "theory", "error, %")
    for name, found, theory in queue_rows(requests):
        table.add_row(name, f"{found:.4f}", f"{theory:.4f}", f"{100 * (found / theory - 1):+.2f}")
    return table


def queue_rows(requests: int) -> Iterator[tuple[str, float, float]]:
    """(queue, simulated, theory)."""
    rng = np.random.default_rng(0)
    drawn = rng.exponential(1.0, requests)
    load = 0.7
    yield "M/M/1, load 0.7", _in_system(drawn, load), 1 / (1 - load)
    yield "M/D/1, load 0.7", _in_system(np.ones(requests), load), 1 + load / (2 * (1 - load))
    cv = 1.5
    wide = rng.gamma(1 / cv**2, cv**2, requests)
    theory = 1 + load * (1 + cv**2) / (2 * (1 - load))
    yield "M/G/1, load 0.7, cv 1.5", _in_system(wide, load), theory
    servers = 8
    offered = load * servers
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    full = offered**servers / math.factorial(servers) / (1 - load)
    waits = full / (sum(terms) + full)
    theory = 1 + waits / (servers * (1 - load))
    yield "M/M/8, load 0.7", _in_system(drawn, offered, servers), theory
    clients, think = 10, 4.0
    queue = response = 0.0
    for n in range(1, clients + 1):
        response = 1 + queue
        queue = n / (think + response) * response
    found = _served(drawn, np.zeros(requests), 1, clients, think)
    yield "closed, 10 clients", float(np.mean(found.latencies.e2e)), response
    cycle = float(np.mean(found.latencies.e2e)) + think
    yield "N = X (R + Z)", requests / found.makespan_s * cycle, float(clients)


def pool_table() -> Table:
    """Predictions for Mooncake's conversations, at 15 times their rate, on 384 NPUs."""
    table = simple_table(
        "Predictions: Mooncake's conversations on 384 NPUs", "what", "TTFT p50", "p99", "TPOT p50",
        "p99", "output tokens/s", "within SLO, %", "hits, %", "verdict",
    )  # fmt: skip
    for what, found in pool_rows():
        result = found.to_dict()
        latency = [result[key][p] for key in ("ttft_ms", "tpot_ms") for p in ("p50", "p99")]
        table.add_row(
            what, *(f"{v:,.1f}" for v in latency), f"{result['output_tokens_per_s']:,.0f}",
            f"{100 * result['slo_attainment']:.1f}", f"{100 * result['cache_hit_tokens']:.0f}",
            result["verdict"],
        )  # fmt: skip
    return table


def pool_rows() -> Iterator[tuple[str, ServingResult]]:
    """(what, result)."""
    trace = conversations()
    slo: dict[str, Any] = {"slo_ttft_ms": 5000.0, "slo_tpot_ms": 50.0, "rate_scale": 15.0}
    paper = paper_service(384)
    yield "prefill, decode and cache pools", serve(trace, paper, **slo)
    # Colocated instances of the same 384 NPUs; EP320 and EP32 are for separate phases.
    together = Service(name="colocated", colocated=ColocatedPool(npus=32, instances=12),
                       cache=ContextCache())  # fmt: skip
    yield "12 colocated instances of 32", serve(trace, together, **slo)
    vpc = dataclasses.replace(paper, cache=ContextCache(plane="vpc"))
    yield "the cache over the VPC plane", serve(trace, vpc, **slo)
    yield "no cache", serve(trace, paper, cache_blocks=0, **slo)
    lost = (
        Loss(pool="prefill", at_s=60.0, back_s=65.0),
        Loss(pool="decode", at_s=90.0, back_s=95.0),
    )
    failing = dataclasses.replace(paper, losses=lost)
    yield "an instance of each pool lost for 5 s", serve(trace, failing, **slo)


def slo_table() -> Table:
    """The most that the paper's pools serve within an SLO."""
    table = simple_table(
        "Predictions: the largest rate at which 90 % keep TTFT 5 s and a TPOT", "TPOT within, ms",
        "requests/s", "times the trace", "output tokens/s", "TTFT p99", "TPOT p50", "p99",
        "prefill busy, %", "decode busy, %",
    )  # fmt: skip
    for tpot_ms, found in slo_rows():
        if not found.rate_scale:
            table.add_row(f"{tpot_ms:g}", "no rate keeps it")
            continue
        table.add_row(
            f"{tpot_ms:g}", f"{found.goodput_requests_per_s:.1f}", f"{found.rate_scale:.1f}",
            f"{found.output_tokens_per_s:,.0f}", f"{found.ttft_p99_ms:,.0f}",
            f"{found.tpot_p50_ms:.1f}", f"{found.tpot_p99_ms:.1f}",
            *(f"{100 * found.busy[pool]:.0f}" for pool in ("prefill", "decode")),
        )  # fmt: skip
    return table


def slo_rows() -> Iterator[tuple[float, Judged]]:
    """(TPOT in ms, the paper's pools at the largest rate that keeps it)."""
    trace = conversations()
    paper, machine = paper_service(384), load_machine("cloudmatrix384")
    times = price_service(paper, machine)
    for tpot_ms in (15.0, 20.0, 30.0, 50.0):
        replay = Replay(slo_ttft_s=5.0, slo_tpot_s=tpot_ms * 1e-3)
        yield (
            tpot_ms,
            judge(Question(
                service=paper, times=times, trace=trace, machine=machine, replay=replay, guess=15.0,
                target=0.9,
            )),
        )  # fmt: skip


def reuse_table() -> Table:
    """Prefill alone, 4K prompts: all at once for throughput, at a rate of its own for TTFT."""
    table = simple_table(
        "Predictions: prompts of 4K tokens, part of them reused", "reused", "cache over", "hits, %",
        "prompt tokens/s per prefill NPU", "mean TTFT, ms",
    )  # fmt: skip
    for reuse, plane, hits, tokens_per_s, ttft_ms in reuse_rows():
        table.add_row(
            f"{reuse:.0%}", plane, f"{100 * hits:.0f}", f"{tokens_per_s:,.0f}", f"{ttft_ms:,.0f}"
        )
    return table


def reuse_rows() -> Iterator[tuple[float, str, float, float, float]]:
    """(share reused, plane, hits, prompt tokens per second and NPU of prefill, mean TTFT in ms)."""
    paper = paper_service(384)
    assert paper.prefill is not None
    cases: tuple[tuple[float, Literal["ub", "vpc"]], ...] = (
        (0.0, "ub"), (0.5, "ub"), (0.5, "vpc"), (0.9, "ub"), (0.9, "vpc"),
    )  # fmt: skip
    for reuse, plane in cases:
        service = dataclasses.replace(paper, cache=ContextCache(plane=plane))
        prompts = generate(
            requests=8000, rate=1e6, prompt=4096, output=1, reuse=reuse, trees=64, branches=1
        )
        at_once = serve(prompts, service)
        tokens = at_once.to_dict()["prompt_tokens_per_s"] / paper.prefill.total_npus
        calm = serve(prompts.at_rate(200.0), service).to_dict()
        yield reuse, plane, calm["cache_hit_tokens"], tokens, calm["ttft_ms"]["mean"]


def overload_table() -> Table:
    """Admission control at a rate that neither pool can keep up with."""
    table = simple_table(
        "Overload: small decode pool, 25 times the rate", "admission", "rejected", "after prefill",
        "goodput, requests/s", "swing of prefill", "of decode", "correlation",
    )  # fmt: skip
    for name, found in overload_rows():
        result = found.to_dict()
        prefill, decode = loads(found)
        table.add_row(
            name, f"{result['rejected']:,}", f"{result['rejected_after_prefill']:,}",
            f"{result['goodput_requests_per_s']:.1f}", f"{prefill.std() / prefill.mean():.2f}",
            f"{decode.std() / decode.mean():.2f}",
            f"{np.corrcoef(prefill, decode)[0, 1]:+.2f}",
        )  # fmt: skip
    return table


def overload_rows() -> Iterator[tuple[str, ServingResult]]:
    """(admission, result): decode holds few requests, so that admission by its load matters."""
    trace = conversations()
    paper = paper_service(384)
    assert paper.decode is not None
    small = dataclasses.replace(paper, decode=dataclasses.replace(paper.decode, batch=2))
    for admission in ("none", "late", "early", "predictive"):
        service = dataclasses.replace(small, admission=admission)
        yield (
            admission,
            serve(trace, service, rate_scale=25.0, slo_ttft_ms=10_000.0, slo_tpot_ms=100.0),
        )


def loads(found: ServingResult) -> tuple[np.ndarray, np.ndarray]:
    """Busy prefill instances and decoding requests over the time of arrivals, the ramp left out."""
    bins = int(found.trace.duration_s / found.bin_s)
    middle = slice(bins // 5, bins)
    return found.gauge("prefill_busy")[middle], found.gauge("decode_running")[middle]


def _in_system(service_s: np.ndarray, rate: float, servers: int = 1) -> float:
    arrival = np.cumsum(np.random.default_rng(1).exponential(1 / rate, len(service_s)))
    return float(np.mean(_served(service_s, arrival, servers).latencies.e2e))


def _served(service_s, arrival, servers: int, clients: int = 0, think_s: float = 0.0):
    """A colocated instance that takes one request at a time, 1 µs a token."""
    count, one = len(service_s), np.zeros(1)
    trace = Trace(
        arrival_s=arrival, prompt=np.maximum(np.rint(service_s * 1e6), 1).astype(np.int64),
        output=np.ones(count, np.int64), block_start=np.zeros(count + 1, np.int64),
        block=np.zeros(0, np.int32),
    )  # fmt: skip
    step = StepTable(
        tokens=np.array([0.0, 1e6]), length=one, requests=one, context=one,
        batch_s=np.array([0.0, 1.0]).reshape(2, 1, 1, 1),
    )  # fmt: skip
    service, times = measured_engine(step, batch=1, tokens=10**9, page=1)
    assert service.colocated is not None
    pool = dataclasses.replace(service.colocated, instances=servers)
    service = dataclasses.replace(service, colocated=pool)
    return serve(trace, service, times=times, clients=clients, think_s=think_s)


def _published(path: Path) -> dict[str, float]:
    """Errors in per cent, by the keys of `compare`."""
    text = (path / "published_simulator_error.txt").read_text()
    found = re.findall(r"^(TTFT|TPOT) (Mean|P90|P99)\s.*?([+-][\d.]+)%", text, re.MULTILINE)
    return {f"{kind}_{of}_ms".lower(): float(error) for kind, of, error in found}


if __name__ == "__main__":
    leave(run_program(main, Study, __doc__))
