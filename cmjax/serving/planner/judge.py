"""What a service is worth: the largest rate of the trace that it serves within the SLO,
simulated."""

import dataclasses
import math

import numpy as np

from cmjax.hardware import Supernode
from cmjax.serving.assemble import Replay
from cmjax.serving.result import ServingResult
from cmjax.serving.serve import simulate
from cmjax.serving.service import Service
from cmjax.serving.step_times import StepTimes
from cmjax.serving.traces import Trace

_LEAST_S, _SLOS, _MOST = 20.0, 20, 200_000
"""A rate must be served for so many seconds and so many times as long as TTFT may be, which a short
trace is repeated for, up to so many requests: else a queue that only grows would pass."""
_WIDEST = 64.0  # times the first guess, up or down


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """One service to be judged; all that another process needs.

    Fields:
      guess: of the rate, times the trace's. target: share of requests that must keep the SLO.
    """

    service: Service
    times: StepTimes
    trace: Trace
    machine: Supernode
    replay: Replay
    guess: float
    target: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A service at the largest rate that keeps the SLO.

    Fields:
      service: what was judged. rate_scale: that rate, times the trace's; 0 if none keeps it.
      goodput_requests_per_s: requests within the SLO, of those offered at that rate.
      output_tokens_per_s: of those. attainment: their share.
      ttft_p99_ms, tpot_p50_ms, tpot_p99_ms: there. busy: share of time by pool.
      cache_hit_tokens: share of prompt tokens.
    """

    service: Service
    rate_scale: float = 0.0
    goodput_requests_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    attainment: float = 0.0
    ttft_p99_ms: float = float("nan")
    tpot_p50_ms: float = float("nan")
    tpot_p99_ms: float = float("nan")
    busy: dict[str, float] = dataclasses.field(default_factory=dict)
    cache_hit_tokens: float = 0.0


def judge(question: Question) -> Judged:
    """Bisect the rate, on a logarithmic scale, from a bracket around the guess."""
    low, high, best = 0.0, np.inf, None
    scale = question.guess
    while high / max(low, 1e-9) > 1.02:
        found = _at(question, scale)
        kept = float(found.kept.mean()) >= question.target
        if kept and found.verdict != "overloaded":
            low, best = scale, found
        else:
            high = scale
        if high == np.inf:
            scale = low * 1.5
            if scale > question.guess * _WIDEST:
                break
        elif low == 0.0:
            scale = high / 1.5
            if scale < question.guess / _WIDEST:
                break
        else:
            scale = float(np.sqrt(low * high))
    return Judged(service=question.service) if best is None else _judged(question, low, best)


def _at(question: Question, scale: float) -> ServingResult:
    """The trace at a rate, for long enough to tell."""
    slo_s = question.replay.slo_ttft_s or _LEAST_S
    least_s = max(_LEAST_S, _SLOS * slo_s)
    duration_s = max(question.trace.duration_s / scale, 1e-3)
    copies = min(math.ceil(least_s / duration_s), max(_MOST // question.trace.requests, 1))
    trace = question.trace.repeated(copies).faster(scale)
    return simulate(trace, question.service, question.machine, question.times, question.replay)


def _judged(question: Question, scale: float, found: ServingResult) -> Judged:
    result = found.to_dict()
    offered = question.trace.rate * scale
    attainment = float(found.kept.mean())
    mean_output = float(found.trace.output[found.kept].mean())
    tpot = result["tpot_ms"] or {"p50": float("nan"), "p99": float("nan")}
    return Judged(
        service=question.service,
        rate_scale=scale,
        goodput_requests_per_s=offered * attainment,
        output_tokens_per_s=offered * attainment * mean_output,
        attainment=attainment,
        ttft_p99_ms=result["ttft_ms"]["p99"],
        tpot_p50_ms=tpot["p50"],
        tpot_p99_ms=tpot["p99"],
        busy=result["utilization"],
        cache_hit_tokens=result["cache_hit_tokens"],
    )
