"""What a replay says."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.console import html_table
from cmjax.files import replace_text
from cmjax.serving.assemble import Replay
from cmjax.serving.engine import GAUGES, EngineOutputs
from cmjax.serving.engine.outputs import REJECTED, REJECTED_LATE
from cmjax.serving.engine.table import Lookup
from cmjax.serving.metrics import Latencies, gaps_ms, kept_slo, latencies, summary_ms
from cmjax.serving.perfetto import perfetto_text
from cmjax.serving.requests_file import columns_of, write_columns
from cmjax.serving.service import Service
from cmjax.serving.step_times import StepTimes
from cmjax.serving.traces import Trace
from cmjax.serving.verdict import verdict

_BOUNDED = ("ttft_ms", "tpot_ms", "e2e_ms")
_COUNTED = ("goodput_requests_per_s", "slo_attainment", "output_tokens_per_s")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ServingResult:
    """A trace replayed through a service.

    Fields:
      trace, service, replay: what was replayed, and how. times: of steps.
      machine: its name. outputs: per request, and what the workers did.
      bin_s: width of the bins of gauges. wall_s: seconds the event loop took; engine: `native` or
      `python`. bounds: the same run with faster and with slower steps, where step times are
      uncertain.
    """

    trace: Trace
    service: Service
    machine: str
    times: StepTimes
    replay: Replay
    outputs: EngineOutputs
    bin_s: float
    wall_s: float
    engine: str
    bounds: "tuple[ServingResult, ServingResult] | None" = None

    @functools.cached_property
    def latencies(self) -> Latencies:
        """Seconds of every request."""
        return latencies(self.trace, self.outputs)

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """Which requests kept the SLO."""
        return kept_slo(self.latencies, self.replay.slo_ttft_s, self.replay.slo_tpot_s)

    @property
    def makespan_s(self) -> float:
        """From the first arrival to the last token."""
        return float(self.outputs.last_s.max() - self.outputs.arrival_s.min())

    @functools.cached_property
    def verdict(self) -> str:
        """*stable*, *backlogged* or *overloaded*; `cmjax.serving.verdict` has the rule."""
        first = "prefill" if self.service.prefill else "colocated"
        tokens = max(int(np.median(self.trace.prompt - self.outputs.hit_tokens)), 1)
        alone_s = Lookup(self.times.tables[first]).step_s(tokens, float(tokens), 0, 0.0, tokens, 1)
        closed = self.replay.clients > 0
        return verdict(self.outputs.arrival_s, alone_s, self.latencies, closed=closed)

    @property
    def gauge_bins_s(self) -> np.ndarray:
        """Starts of the bins of `gauges`."""
        return np.arange(len(self.outputs.gauges)) * self.bin_s

    def gauge(self, name: str) -> np.ndarray:
        """Means over bins of `prefill_queue`, `prefill_busy`, `decode_queue`, `decode_running`,
        `decode_busy` or `kv_tokens`."""
        return self.outputs.gauges[:, GAUGES.index(name)] / self.bin_s

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: the JSON of `cmjax serve`. A latency that no request has is null."""
        found, out = self.latencies, self.outputs
        span_s = max(self.makespan_s, 1e-9)
        done = found.completed
        tokens = int(self.trace.output[done].sum())
        blocks = np.diff(self.trace.block_start)
        kept = float(self.kept.sum())
        result = {
            "requests": self.trace.requests,
            "completed": int(done.sum()),
            "rejected": int(np.isin(out.ended, (REJECTED, REJECTED_LATE)).sum()),
            "rejected_after_prefill": int((out.ended == REJECTED_LATE).sum()),
            "unserved": int((out.ended == 0).sum()),
            "verdict": self.verdict,
            "ttft_ms": summary_ms(found.ttft),
            "tpot_ms": summary_ms(found.tpot),
            "itl_ms": gaps_ms(out.gaps),
            "e2e_ms": summary_ms(found.e2e),
            "wait_ms": summary_ms(found.wait),
            "offered_requests_per_s": _rate(self.trace.requests, out.arrival_s),
            "completed_requests_per_s": float(done.sum()) / span_s,
            "prompt_tokens_per_s": float(self.trace.prompt[done].sum()) / span_s,
            "output_tokens_per_s": tokens / span_s,
            "tokens_per_s_per_npu": tokens / span_s / self.service.npus,
            "goodput_requests_per_s": kept / span_s,
            "slo_attainment": kept / self.trace.requests,
            "slo_ttft_ms": _ms(self.replay.slo_ttft_s),
            "slo_tpot_ms": _ms(self.replay.slo_tpot_s),
            "cache_hit_blocks": _share(out.hit_blocks.sum(), blocks.sum()),
            "cache_hit_tokens": _share(out.hit_tokens.sum(), self.trace.prompt.sum()),
            "retries": int(out.retries.sum()),
            "makespan_s": self.makespan_s,
            "utilization": self._utilization(),
            "interpolation_error": {"mean": self.times.mean_error, "worst": self.times.worst_error},
            "step_times": self.times.source,
            "machine": self.machine,
            "deployment": dataclasses.asdict(self.service) | {"losses": _losses(self.service)},
            "npus": self.service.npus,
            "seed": self.replay.seed,
            "events": out.events,
            "engine": self.engine,
            "wall_s": self.wall_s,
        }
        if self.bounds is not None:
            result["interval"] = _interval(*(bound.to_dict() for bound in self.bounds))
        return result

    def write_requests(self, path: str | Path) -> None:
        """A row per request, to `.csv` or `.parquet`.

        Raises: ValueError: another suffix, or Parquet without pyarrow.
        """
        write_columns(columns_of(self.trace, self.outputs, self.latencies), path)

    def write_trace(self, path: str | Path) -> None:
        """A Perfetto (Chrome) trace of the instances' busy intervals; needs `record`."""
        replace_text(path, perfetto_text(self.service, self.outputs, self.bin_s))

    def __repr__(self) -> str:
        return f"ServingResult({', '.join(' '.join(row) for row in self._headlines())})"

    def _repr_html_(self) -> str:
        return html_table(f"{self.service.name} under {self.trace.source}", self._headlines())

    def _headlines(self) -> list[tuple[str, str]]:
        found = self.to_dict()
        rows = [("verdict", found["verdict"]), ("completed", f"{found['completed']:,}")]
        for name, key in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms")):
            if found[key] is not None:
                rows.append((name, f"p50 {found[key]['p50']:.4g} p99 {found[key]['p99']:.4g} ms"))
        rows.append(("output", f"{found['output_tokens_per_s']:,.0f} tokens/s"))
        return rows

    def _utilization(self) -> dict[str, float]:
        """Share of the time that an instance of each pool runs steps."""
        found, first = {}, 0
        for name, pool in self.service.pools.items():
            busy = self.outputs.busy_s[first : first + pool.instances]
            found[name] = float(busy.mean() / max(self.makespan_s, 1e-9))
            first += pool.instances
        return found


def _interval(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: {p: [low[key][p], high[key][p]] for p in low[key]}
        for key in _BOUNDED
        if low[key] is not None and high[key] is not None
    }
    return found | {key: sorted((low[key], high[key])) for key in _COUNTED}


def _losses(service: Service) -> list[dict[str, Any]]:
    """JSON has no infinity: an instance that never comes back is back at null."""
    found = [dataclasses.asdict(loss) for loss in service.losses]
    return [x | {"back_s": x["back_s"] if np.isfinite(x["back_s"]) else None} for x in found]


def _rate(requests: int, arrival_s: np.ndarray) -> float | None:
    span_s = float(arrival_s.max() - arrival_s.min())
    return (requests - 1) / span_s if span_s else None


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
