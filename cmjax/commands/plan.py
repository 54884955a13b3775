"""`cmjax plan`: how many NPUs for what, for a trace and an SLO."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cmjax import report
from cmjax.commands.serve import Offered
from cmjax.console import check_target, emit, show_progress
from cmjax.report.figure_path import checked_path
from cmjax.serving import read_service
from cmjax.serving.planner import plan
from cmjax.sweep import WorkerPool


@tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Split NPUs into prefill and decode, for the most requests within an SLO.

    Attributes:
      trace: What `cmjax serve` takes; its rate is scaled to what each split serves.
      npus: To split.
      slo_ttft_ms: Time to first token that a good request keeps.
      slo_tpot_ms: Time per output token that a good request keeps.
      target: Share of the requests offered that must keep the SLO.
      deployment: Model, formats, cache and rules of this .toml file; of its pools only tp stays.
      on: Machine: a name of the catalog, or a .toml file.
      cache_blocks: Blocks of the context cache; 0 is none.
      prefill_npus: Sizes of prefill instances to consider.
      decode_npus: Sizes of decode instances to consider; all dies of one are its EP group.
      json: Write the plan as JSON to this file; `-` is standard output.
      plot: Draw throughput against TPOT to this .png or .svg.
    """

    trace: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRACE")]
    npus: int = 384
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    target: float = 0.9
    deployment: str | None = None
    on: str = "cloudmatrix384"
    cache_blocks: int | None = None
    prefill_npus: tuple[int, ...] = (16, 32)
    decode_npus: tuple[int, ...] = (32, 64, 96, 160)
    offered: Offered = dataclasses.field(default_factory=Offered)
    pool: WorkerPool = dataclasses.field(default_factory=WorkerPool)
    json: str | None = None
    plot: Path | None = None

    def run(self, console: Console) -> None:
        check_target(self.json, self.plot)
        if self.plot is not None:
            checked_path(self.plot)
        service = None if self.deployment is None else read_service(self.deployment, self.npus)
        if self.cache_blocks is not None:
            service = (service or read_service("cloudmatrix384")).with_cache_blocks(
                self.cache_blocks
            )
        trace = self.offered.read(self.trace)
        with (
            self.pool.executor() as executor,
            show_progress("planning", quiet=self.json == "-") as progress,
        ):
            found = plan(
                trace, self.on,
                npus=self.npus,
                slo_ttft_ms=self.slo_ttft_ms,
                slo_tpot_ms=self.slo_tpot_ms,
                target=self.target,
                service=service,
                prefill_npus=self.prefill_npus,
                decode_npus=self.decode_npus,
                seed=self.offered.seed,
                executor=executor,
                progress=progress,
            )  # fmt: skip
        if self.plot is not None:
            report.plot_pareto(found, self.plot)
        result = found.to_dict()
        emit(console, self.json, result, report.plan_table(result))
