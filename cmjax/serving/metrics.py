"""What is said of a run: latencies as load generators define them, goodput, hits.

    TTFT = first token - arrival        TPOT = (last token - first token) / (output tokens - 1)

TPOT is one number per request (vLLM's bench and GenAI-Perf's "inter token latency" are this); ITL
is every gap between two consecutive steps of a request, over all requests (vLLM's bench calls it
so).
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float64

from cmjax.serving.engine import EngineOutputs
from cmjax.serving.engine.outputs import COMPLETED, GAP_LOW, GAP_PER_OCTAVE
from cmjax.serving.traces import Trace

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Latencies:
    """Seconds per request; NaN where a request has none.

    Fields:
      ttft, tpot, e2e: see the module. wait: for a place in a prefill batch, and again for one in a
        decode batch.
      completed: which requests are.
    """

    ttft: Float64[np.ndarray, "requests"]
    tpot: Float64[np.ndarray, "requests"]
    e2e: Float64[np.ndarray, "requests"]
    wait: Float64[np.ndarray, "requests"]
    completed: Bool[np.ndarray, "requests"]


def latencies(trace: Trace, found: EngineOutputs) -> Latencies:
    """Of every request."""
    done = found.ended == COMPLETED
    gaps = trace.output - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(done & (gaps > 0), (found.last_s - found.first_s) / gaps, np.nan)
    waited = np.where(done, found.scheduled_s - found.arrival_s, np.nan)
    moved = done & (found.decode_s >= 0)
    return Latencies(
        ttft=np.where(done, found.first_s - found.arrival_s, np.nan),
        tpot=tpot,
        e2e=np.where(done, found.last_s - found.arrival_s, np.nan),
        wait=waited + np.where(moved, found.decode_s - found.first_s, 0.0),
        completed=done,
    )


def summary_ms(seconds: np.ndarray) -> dict[str, float] | None:
    """Mean and percentiles in ms of what is not NaN; `None` of nothing."""
    known = seconds[~np.isnan(seconds)]
    if not known.size:
        return None
    found = np.percentile(known, PERCENTILES)
    named = {f"p{p}": float(v) * 1e3 for p, v in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(known.mean()) * 1e3, **named, "max": float(known.max()) * 1e3}


def gaps_ms(gaps: np.ndarray) -> dict[str, float] | None:
    """The same of gaps that were counted by length: exact to 1/128 of an octave."""
    total = gaps.sum()
    if not total:
        return None
    index = np.arange(len(gaps))
    octave, part = index // GAP_PER_OCTAVE, index % GAP_PER_OCTAVE + 0.5
    middle = np.exp2(octave + GAP_LOW) * (1 + part / GAP_PER_OCTAVE)
    upto = np.cumsum(gaps)
    named = {
        f"p{p}": float(middle[np.searchsorted(upto, p / 100 * total)]) * 1e3 for p in PERCENTILES
    }
    most = float(middle[np.flatnonzero(gaps)[-1]]) * 1e3
    return {"mean": float((gaps * middle).sum() / total) * 1e3, **named, "max": most}


def kept_slo(
    found: Latencies, slo_ttft_s: float | None, slo_tpot_s: float | None
) -> Bool[np.ndarray, "requests"]:
    """Which requests are completed within both SLOs; one of a single token has no TPOT to miss."""
    kept = found.completed.copy()
    if slo_ttft_s is not None:
        kept &= found.ttft <= slo_ttft_s
    if slo_tpot_s is not None:
        kept &= np.isnan(found.tpot) | (found.tpot <= slo_tpot_s)
    return kept
