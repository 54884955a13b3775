"""`cmjax predict`: a prefill or decode instance."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

import cmjax
from cmjax import report
from cmjax.console import check_target, emit
from cmjax.deploy import Deployment, Requests, predictor_of
from cmjax.placement import read_plan
from cmjax.report.plots.figure import checked_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict a serving instance: step time, TPOT or TTFT, tokens/s per NPU."""

    deployment: tyro.conf.OmitArgPrefixes[Deployment]
    requests: tyro.conf.OmitArgPrefixes[Requests] = dataclasses.field(default_factory=Requests)
    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    load: str = "perfect"
    """Expert load: `perfect`, or a file of counts that `cmjax place` reads."""
    plan: Path | None = None
    """Where experts live under LOAD: a file that `cmjax place` writes (default: greedily)."""
    slo_tpot_ms: float | None = None
    """Find the largest batch whose TPOT stays within this."""
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
        return cmjax.predict(
            self.deployment,
            self.on,
            self.requests,
            loads=None if self.load == "perfect" else self.load,
            plan=plan,
            slo_tpot_ms=self.slo_tpot_ms,
        )
