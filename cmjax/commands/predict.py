"""`cmjax predict`: a prefill or decode instance."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

import cmjax
from cmjax import report
from cmjax.console import check_target, emit, show_progress
from cmjax.deploy import Deployment, Requests, predictor_of
from cmjax.deploy.requests import parse_load
from cmjax.deploy.search import VARIED
from cmjax.placement import read_plan
from cmjax.report.figure_path import checked_path
from cmjax.sweep import executor_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict a serving instance: step time, TPOT or TTFT, tokens/s per NPU."""

    deployment: tyro.conf.OmitArgPrefixes[Deployment]
    requests: tyro.conf.OmitArgPrefixes[Requests] = dataclasses.field(default_factory=Requests)
    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    load: str = "perfect"
    """Expert load: `perfect`, rows on the slowest rank over the mean (`1.6`), or a file of counts
    that `cmjax place` reads."""
    plan: Path | None = None
    """Where experts live under LOAD: a file that `cmjax place` writes (default: greedily)."""
    slo_tpot_ms: float | None = None
    """Find the largest batch whose TPOT stays within this."""
    slo_ttft_ms: float | None = None
    """With --search, of prefill: the limit on TTFT."""
    search: bool = False
    """Search EP degrees, microbatches and batches for most tokens/s per NPU within the SLO."""
    vary: tuple[str, ...] = ()
    """What --search varies besides: `quant=int8,bf16 kv_cache=bf16,int8 ep=32,64,320 ...`."""
    workers: int | None = None
    """Processes of --search (default: one per core)."""
    scheduler: str | None = None
    """Address of a Dask scheduler, to run --search on its cluster instead."""
    sensitivity: bool = False
    """Also report by how many percent the step changes per percent of each machine constant."""
    json: str | None = None
    """Write the result as JSON to this file; `-` is standard output."""
    trace: Path | None = None
    """Write a Perfetto (Chrome) trace to this file."""
    plot: Path | None = None
    """Draw the step to this .png or .svg."""

    def run(self, console: Console) -> None:
        check_target(self.json, self.trace, self.plot)
        if self.plot is not None:
            checked_path(self.plot)
        if self.search:
            self._search(console)
            return
        for name in ("vary", "slo_ttft_ms", "workers", "scheduler"):
            if getattr(self, name) not in (None, ()):
                raise ValueError(f"--{name.replace('_', '-')} belongs to --search")
        plan = None if self.plan is None else read_plan(self.plan)
        prediction = self.predict(plan)
        result = prediction.to_dict()
        predictor = predictor_of(prediction, plan)
        if self.sensitivity:
            result["sensitivity"] = predictor.sensitivity(prediction.requests)
        if self.trace or self.plot:
            timeline = predictor.timeline(prediction.requests)
            if self.trace:
                timeline.to_perfetto(self.trace)
            if self.plot:
                report.plot_step(result, self.plot, timeline)
        emit(console, self.json, result, report.prediction_table(result))
        if self.sensitivity and self.json != "-":
            console.print(report.sensitivity_table(result["sensitivity"]))

    def predict(self, plan=None) -> cmjax.Prediction:
        """What the options describe, predicted."""
        requests, loads = self._served()
        return cmjax.predict(
            self.deployment,
            self.on,
            requests,
            loads=loads,
            plan=plan,
            slo_tpot_ms=self.slo_tpot_ms,
        )

    def _served(self) -> tuple[Requests, str | None]:
        """The requests, under an expert load that is a number; a file of one."""
        given = parse_load(self.load)
        return dataclasses.replace(self.requests, load=given.get("load")), given.get("loads")

    def _search(self, console: Console) -> None:
        for name in ("plan", "trace", "sensitivity"):
            if getattr(self, name):
                raise ValueError(f"--{name} is of one deployment; leave it out with --search")
        requests, loads = self._served()
        if loads is not None:
            raise ValueError(
                "--load FILE needs one deployment's slots; with --search give `perfect` or a number"
            )
        with (
            executor_of(self.scheduler, self.workers) as executor,
            show_progress("searching", quiet=self.json == "-") as progress,
        ):
            found = cmjax.search(
                self.deployment,
                self.on,
                requests,
                slo_tpot_ms=self.slo_tpot_ms,
                slo_ttft_ms=self.slo_ttft_ms,
                executor=executor,
                progress=progress,
                **_varied(self.vary),
            )
        if self.plot is not None:
            report.plot_search(found, self.plot)
        result = found.to_dict()
        emit(console, self.json, result, report.search_table(result))


def _varied(words: tuple[str, ...]) -> dict[str, tuple[int | str, ...]]:
    """`quant=int8,bf16` as an option of `cmjax.search`."""
    found = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.replace("-", "_")
        if not equals or not values or name not in VARIED:
            raise ValueError(
                f"--vary takes NAME=VALUE,VALUE with a name of {', '.join(VARIED)}; got {word!r}"
            )
        found[name] = tuple(int(v) if v.isdecimal() else v for v in values.split(","))
    return found
