"""`cmjax predict`: a prefill or decode instance."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from cmjax import placement, report
from cmjax.console import check_target, emit
from cmjax.cost.load import imbalance
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.predictor import Predictor, Requests, fastest
from cmjax.hardware import load_machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict a serving deployment: step time, TPOT or TTFT, tokens per second and NPU."""

    phase: tyro.conf.Positional[Literal["decode", "prefill"]]
    """Which half of a disaggregated system."""
    model: str = "deepseek-r1"
    """Preset name, or the path of a Hugging Face config.json."""
    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    npus: int | None = None
    """NPUs of one instance (default: 160 for decode, 16 for prefill)."""
    batch: float | None = None
    """Requests per NPU (default: 96 for decode, 16384 / prompt for prefill)."""
    prompt: float = 4096
    """Prompt tokens of a request."""
    output: float = 256
    """Generated tokens of a request; decode is priced in the middle of them."""
    mtp: bool = True
    """Draft one token per request and step with the MTP module."""
    mtp_acceptance: float = 0.7
    """Probability that a draft is accepted."""
    microbatches: Literal["auto", "1", "2"] = "auto"
    """Overlapping microbatches; auto takes the faster."""
    quant: Literal["int8", "bf16", "msd_w8a16", "msd_w4a16"] = "int8"
    """Matrices and dispatched tokens (8-bit is FP8 on a chip that has it)."""
    attention: Literal["exact", "pasa_fp16"] = "exact"
    """Softmax attention as it is, or in float16 with the shifted scores of PASA."""
    kv_cache: Literal["bf16", "int8", "mxfp4"] = "bf16"
    """Format of the latent cache."""
    ep: int = 0
    """Ranks (dies) per expert-parallel group; 0 means all of the instance."""
    load: str = "perfect"
    """Expert load: `perfect`, or a file of counts that `cmjax place` reads (placed greedily)."""
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
        predictor, requests = self.solve()
        timeline = predictor.timeline(requests)
        result = predictor.report(requests, timeline)
        if self.sensitivity:
            result["sensitivity"] = predictor.sensitivity(requests)
        if self.trace:
            timeline.to_perfetto(self.trace)
        if self.plot:
            report.plot_step(result, self.plot, timeline)
        emit(console, self.json, result, report.prediction_table(result))
        if self.sensitivity and self.json != "-":
            console.print(report.sensitivity_table(result["sensitivity"]))

    def solve(self) -> tuple[Predictor, Requests]:
        """The traced deployment and the requests that the options describe."""
        machine = load_machine(self.on)
        decoding = self.phase == "decode"
        if self.slo_tpot_ms is not None and not decoding:
            raise ValueError("slo-tpot-ms applies to decode")
        requests = Requests(
            batch=self.batch if self.batch is not None else 96 if decoding else 16384 / self.prompt,
            prompt=self.prompt,
            output=self.output,
            acceptance=self.mtp_acceptance,
            load=None if self.load == "perfect" else 1.0,
        )
        choices = (1, 2) if self.microbatches == "auto" else (int(self.microbatches),)
        deployments = [
            Deployment(
                phase=self.phase,
                model=self.model,
                npus=self.npus or (160 if decoding else 16),
                ep=self.ep,
                microbatches=count,
                quant=self.quant,
                attention=self.attention,
                kv_cache=self.kv_cache,
                mtp=self.mtp,
            )
            for count in choices
        ]
        predictors = [Predictor.of(d, machine) for d in deployments]
        if self.load != "perfect":
            requests = dataclasses.replace(requests, load=file_load(self.load, predictors[0]))
        return fastest(predictors, requests, self.slo_tpot_ms)


def file_load(path: str, predictor: Predictor) -> np.ndarray:
    """Rows on the slowest rank over the mean, per MoE layer, of counts placed greedily.

    The routed slots of the deployment are filled by greedy replicate-and-pack; ranks that hold
    shared replicas are not the slowest by construction.
    Raises: ValueError: counts of another number of layers or experts.
    """
    step = predictor.step
    loads = placement.read_loads(path)
    found = (loads.layers, loads.experts)
    if found != (step.layers, step.experts):
        raise ValueError(
            f"load {path}: {found[0]} layers x {found[1]} experts; the model has {step.layers} MoE "
            f"layers x {step.experts} experts"
        )
    slots_per_rank = step.expert_slots // step.ranks
    ranks = (step.expert_slots - step.shared_slots) // slots_per_rank
    problem = placement.Problem(loads, ranks, ranks * slots_per_rank - step.experts)
    plan = placement.greedy(problem)
    return np.asarray(imbalance(plan.tokens_per_rank(loads.counts.mean(0))))
