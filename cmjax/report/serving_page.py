"""The page that `cmjax serve` writes: whether the service keeps up, and where requests wait."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from cmjax.report.html import Section, write_page
from cmjax.report.plots import latency_title, plot_latency, plot_queues, queues_title
from cmjax.report.units import number, percent
from cmjax.serving import ServingResult

_ROWS = (
    ("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL, every gap"),
    ("e2e_ms", "end to end"), ("wait_ms", "waiting"),
)  # fmt: skip
_MEANING = {
    "stable": "Queues stay short for as long as requests arrive.",
    "backlogged": "Queues form that take longer than a request itself, and are worked off.",
    "overloaded": "The wait grows for as long as requests arrive, or requests are refused: "
    "latencies depend on where the trace ends.",
}


@dataclass(frozen=True)
class ServingPage:
    """The page of a replayed trace."""

    result: ServingResult

    def write(self, path: str | Path) -> None:
        """Write the page; an existing one is replaced only when the new one is complete.

        Raises: ValueError if `path` does not end in .html or its folder does not exist.
        """
        result = self.result
        with tempfile.TemporaryDirectory() as folder:
            queues, latency = Path(folder) / "queues.svg", Path(folder) / "latency.svg"
            plot_queues(result, queues)
            plot_latency(result, latency)
            title = f"{result.trace.source.rpartition('/')[2]} on {result.service.npus} NPUs"
            sections = [
                self._summary(),
                Section("Queues", image=queues, alt=queues_title(result)),
                Section("Latency", image=latency, alt=latency_title(result)),
                self._latencies(),
                self._pools(),
            ]
            write_page(path, title, sections)

    def _summary(self) -> Section:
        found = self.result.to_dict()
        rows = [
            ("completed", f"{found['completed']:,} of {found['requests']:,}"),
            ("rejected", f"{found['rejected']:,}"),
            ("completed, requests/s", number(found["completed_requests_per_s"])),
            ("output, tokens/s", number(found["output_tokens_per_s"])),
            ("output, tokens/s per NPU", number(found["tokens_per_s_per_npu"])),
            ("within the SLO", percent(found["slo_attainment"])),
            ("goodput, requests/s", number(found["goodput_requests_per_s"])),
            ("prompt tokens found in the cache", percent(found["cache_hit_tokens"])),
        ]
        return Section(
            found["verdict"].capitalize(),
            f"{_MEANING[found['verdict']]} Step times: {found['step_times']}.",
            columns=("", "value"),
            rows=tuple(rows),
        )

    def _latencies(self) -> Section:
        found = self.result.to_dict()
        keys = ("mean", "p50", "p90", "p99", "max")
        rows = tuple(
            (words, *(number(found[key][k]) for k in keys))
            for key, words in _ROWS
            if found[key] is not None
        )
        return Section(
            "In numbers", "Milliseconds. TPOT is a mean per request; ITL is every gap.",
            columns=("", "mean", "p50", "p90", "p99", "most"), rows=rows,
        )  # fmt: skip

    def _pools(self) -> Section:
        busy = self.result.to_dict()["utilization"]
        rows = tuple(
            (name, str(pool.instances), str(pool.npus), percent(busy[name]))
            for name, pool in self.result.service.pools.items()
        )
        return Section("Pools", columns=("", "instances", "NPUs each", "busy"), rows=rows)
