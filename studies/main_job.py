"""The main job: price DeepSeek-R1 on CloudMatrix384, and place its experts.

    make run          or          python -m studies.main_job [--out out] [--loads FILE]

Writes tables (`*.json`), plots and one page, `index.html`, into the output folder.
"""

import dataclasses
import json
import time
from pathlib import Path

from rich.console import Console

from cmjax import placement, report
from cmjax.console import show_progress, terminal
from cmjax.deploy import predict
from cmjax.deploy.placed import place as place_experts
from cmjax.files import replace_text
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.report import Section
from studies import cloudmatrix

SLO_TPOT_MS = (15.0, 30.0, 50.0)
BATCHES = (8, 16, 24, 32, 48, 64, 96, 128, 160)
RANKS, REDUNDANT, TOKENS = 64, 64, 96


@dataclasses.dataclass(frozen=True, kw_only=True)
class MainJob:
    """Options of the main job."""

    out: Path = Path("out")
    """Folder for everything written."""
    loads: Path | None = None
    """Expert counts to place (default: a built-in synthetic load of 58 layers x 256 experts)."""
    seconds: float = 30.0
    """Time limit of the placement search."""


def sweep(out: Path, console: Console) -> Section:
    """Throughput against TPOT over batches, the best one under each SLO among them."""
    found = [predict("deepseek-r1", phase="decode", batch=float(b)) for b in BATCHES]
    for slo in SLO_TPOT_MS:
        try:
            found.append(predict("deepseek-r1", phase="decode", slo_tpot_ms=slo))
        except ValueError as error:
            console.print(str(error))
        else:
            console.print(f"TPOT within {slo:g} ms: batch {found[-1].requests.batch:g} per NPU")
    by_batch = {result["requests"]["batch"]: result for result in (p.to_dict() for p in found)}
    results = [by_batch[batch] for batch in sorted(by_batch)]
    replace_text(out / "batch_sweep.json", json.dumps(results, indent=1))
    points = [report.ThroughputPoint.of(result) for result in results]
    report.plot_throughput(points, out / "throughput.png", slo_ms=SLO_TPOT_MS)
    return Section(
        "How many requests to decode together",
        "Each point is a batch, as one microbatch or as two that overlap, whichever is faster; the "
        "step above has two, as the published one.",
        columns=("batch per NPU", "microbatches", "TPOT, ms", "tokens/s per NPU"),
        rows=tuple(
            (
                f"{result['requests']['batch']:g}",
                f"{result['deployment']['microbatches']}",
                f"{result['tpot_ms']:.1f}",
                f"{result['tokens_per_s_per_npu']:,.0f}",
            )
            for result in results
        ),
        image=out / "throughput.png",
    )


def place(job: MainJob, console: Console) -> Section:
    """Experts on 64 dies: every rule and the search, by the priced time of the layer."""
    loads = placement.read_loads(job.loads) if job.loads else placement.example_loads()
    redundant = RANKS - loads.experts % RANKS if loads.experts % RANKS else REDUNDANT
    with show_progress("placing") as progress:
        placed = place_experts(
            loads, "cloudmatrix384",
            ranks=RANKS, redundant=redundant, tokens=TOKENS, seconds=job.seconds,
            progress=progress,
        )  # fmt: skip
    console.print(report.comparison_table(placed.scores))
    report.plot_placement(placed.tokens, job.out / "placement.png")
    placement.write_plan(job.out / "placement.json", placed.plan)
    return Section(
        f"Where {loads.experts} experts live on {RANKS} dies",
        f"{redundant} redundant slots, {TOKENS} tokens per die and step; "
        f"loads: {job.loads or 'built-in, synthetic'}.",
        columns=("method", "time of all layers, ms", "busiest rank over mean", "over bound"),
        rows=tuple(
            (name, f"{s.mean_time_s * 1e3:.2f}", f"{s.mean_par:.3f}", f"{s.gap:.1%}")
            for name, s in placed.scores.items()
        ),
        image=job.out / "placement.png",
    )


def main(job: MainJob) -> None:
    console = terminal()
    start = time.perf_counter()
    job.out.mkdir(parents=True, exist_ok=True)
    sections = cloudmatrix.run(job.out, console)
    sections += [sweep(job.out, console), place(job, console)]
    sections.sort(key=lambda section: section.image is None)  # the long tables come last
    report.write_page(job.out / "index.html", "DeepSeek-R1 on CloudMatrix384", sections)
    console.print(f"wrote {job.out}/index.html in {time.perf_counter() - start:.0f} s")
    console.print("next: open it; then docs/start.md, or `cmjax predict --help`")


if __name__ == "__main__":
    leave(run_program(main, MainJob, __doc__))
