"""The model on 1 to 768 emulated ranks: how long it takes, and what crosses which link.

    python -m studies.mesh [--meshes 1 8 64 384] [--plot mesh.png] [--json mesh.json]
    python -m studies.mesh --meshes 384 --repeat 20       # does it ever hang?

Each mesh runs in a process of its own, with as many XLA devices as it has nodes, and with the
experts (redundant ones and replicas of the shared one included) where a plan of `cmjax place` puts
them. A run starts (imports, devices, parameters in place), compiles, prefills and takes ten decode
steps. Then its bytes are counted (`cmjax.verify.traffic`) and its logits compared with the
unsharded model's.

Three things must be equal to the byte, or the exit code is 1:

* what moved by tier, counted over all pairs of ranks, and what the price of the same step on the
  same mesh assumes for blocks of the same capacity;
* what moved between nodes, and what XLA's executable moves between devices (an array that all
  virtual ranks of a device gather crosses once);
* the real rows in the blocks, and tokens x experts per token x bytes of a row. By tier the price
  spreads rows evenly over the ranks; the last column says how far the routing is from that.

It must not hang. XLA aborts a process whose collective has waited 40 s for a device, which a slow
but healthy step on a loaded machine can need: `prepare_devices` makes that 600 s. Every process is
given up after `--limit-s`.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cmjax import placement
from cmjax.console import check_target, emit, terminal, track
from cmjax.deploy.placed import place
from cmjax.interrupt import leave
from cmjax.mesh import RankMesh
from cmjax.options import run_program
from studies.mesh_figure import plot_meshes
from studies.mesh_worker import small_model

MESHES = {1: "1x1", 8: "2x2x2", 64: "4x8x2", 384: "48x8", 768: "48x8x2"}
LINKS = ("die", "node", "supernode")
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    meshes: tuple[int, ...] = (1, 8, 64, 384)
    """Ranks: 1, 8, 64, 384 or 768."""
    prompt: int = 2
    """Tokens of each rank's prompt."""
    steps: int = 10
    """Decode steps to time."""
    repeat: int = 1
    """More than 1: start, compile and run each mesh so often, without counting."""
    limit_s: float = 1800.0
    """Wall-clock time after which a process is taken to hang."""
    json: str | None = None
    """Write everything that was found to this file; `-` is standard output."""
    plot: Path | None = None
    """Draw bytes by tier and step time to this .png or .svg."""

    def __post_init__(self):
        unknown = sorted(set(self.meshes) - set(MESHES))
        if unknown or not self.meshes:
            raise ValueError(f"--meshes must be of {', '.join(map(str, MESHES))}, got {unknown}")
        for name in ("prompt", "steps", "repeat", "limit_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        room = small_model().max_position - 1
        if self.prompt > room:
            raise ValueError(f"--prompt must be at most {room} tokens, got {self.prompt}")


def run(study: Study) -> list[dict[str, Any]]:
    """What the worker of each mesh, and of each repetition, reports."""
    jobs = [(ranks, n) for ranks in study.meshes for n in range(study.repeat)]
    with tempfile.TemporaryDirectory() as folder:
        plans = {ranks: write_plan(ranks, Path(folder)) for ranks in study.meshes}
        return [
            run_worker(study, ranks, plans[ranks], Path(folder))
            for ranks, _ in track(jobs, "running")
        ]


def write_plan(ranks: int, folder: Path) -> Path | None:
    """Where experts live, by `place` for an uneven load: the shared expert and the hottest
    ones have several slots. One rank needs none."""
    if ranks == 1:
        return None
    config, mesh = small_model(), RankMesh.parse(MESHES[ranks])
    loads = placement.example_loads(
        layers=config.moe_layers, experts=config.routed_experts, windows=1
    )
    placed = place(
        loads, "cloudmatrix384",
        ranks=ranks, nodes=mesh.nodes, redundant=-config.routed_experts % ranks or ranks,
        shared=1,
        method="greedy",
    )  # fmt: skip
    path = folder / f"plan_{ranks}.json"
    placed.save(path)
    return path


def run_worker(study: Study, ranks: int, plan: Path | None, folder: Path) -> dict[str, Any]:
    """One process; a run that fails or hangs reports `error` and nothing else."""
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "studies.mesh_worker", "--mesh", MESHES[ranks]]
    command += ["--json", str(out), "--prompt", str(study.prompt), "--steps", str(study.steps)]
    command += [] if plan is None else ["--plan", str(plan)]
    command += ["--no-count"] if study.repeat > 1 else []
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, timeout=study.limit_s
        )
    except subprocess.TimeoutExpired:
        return {"ranks": ranks, "error": f"no end after {study.limit_s:g} s"}
    if done.returncode:
        # A stuck collective logs very long lines; the cause is near the end.
        last = done.stderr.decode(errors="replace").strip()[-400:]
        return {"ranks": ranks, "error": f"exit code {done.returncode}: {last}"}
    return json.loads(out.read_text())


def faults(found: list[dict[str, Any]]) -> list[str]:
    """What is not as it must be, one line each; none if all is well."""
    lines = [f"{r['ranks']} ranks: {r['error']}" for r in found if "error" in r]
    for result in found:
        for phase, part in result.get("phases", {}).items():
            where = f"{result['ranks']} ranks, {phase}"
            for link in LINKS:
                moved, priced = part["moved"][link], round(part["priced_moved"][link])
                if moved != priced:
                    lines.append(f"{where}: {moved:,} bytes moved by {link}, priced {priced:,}")
            if part["between_devices"] != part["device_bytes"]:
                lines.append(
                    f"{where}: {part['between_devices']:,} bytes counted between devices, the "
                    f"executable moves {part['device_bytes']:,}"
                )
            if sum(part["rows"].values()) != part["rows_sent"]:
                lines.append(
                    f"{where}: {sum(part['rows'].values()):,} bytes of real rows, "
                    f"{part['rows_sent']:,} were routed"
                )
            if part["logits_difference"] > 1e-5:
                lines.append(f"{where}: logits differ by {part['logits_difference']:.1e}")
    return lines


def time_table(found: list[dict[str, Any]]) -> Table:
    """Seconds and memory of every run; CPU seconds do not depend on what else the machine does."""
    table = _table("One process per mesh (CPU seconds; wall clock in brackets)")
    for name in ("ranks", "mesh", "start", "compile", "prefill", "decode step", "all", "peak GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in found:
        if "error" in result:
            continue
        steps = {key: min(values) for key, values in result["steps"].items()}
        seconds = [result["start"], result["compile"], result["prefill"], steps, result["total"]]
        cells = [f"{s['cpu_s']:.3g} ({s['wall_s']:.3g})" for s in seconds]
        memory = f"{result['peak_bytes'] / _GIB:.2f}"
        table.add_row(str(result["ranks"]), result["mesh"], *cells, memory)
    table.caption = "all: start, compile, a prefill and all decode steps; decode step: the fastest"
    return table


def byte_table(found: list[dict[str, Any]]) -> Table:
    """Bytes by tier: moved and priced with full blocks, real rows and priced at an even load."""
    table = _table("Bytes of all ranks in one step")
    for name in ("ranks", "phase", "link", "moved", "priced", "", "rows", "skew", "logits ±"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in found:
        for phase, part in result.get("phases", {}).items():
            for link in LINKS:
                moved, priced = part["moved"][link], round(part["priced_moved"][link])
                rows, even = part["rows"][link], round(part["priced_rows"][link])
                first = link == LINKS[0]
                table.add_row(
                    str(result["ranks"]) if first else "",
                    phase if first else "",
                    link,
                    f"{moved:,}",
                    f"{priced:,}",
                    "=" if moved == priced else "≠",
                    f"{rows:,}",
                    f"{rows / even - 1:+.1%}" if even else "",
                    f"{part['logits_difference']:.1e}" if first else "",
                )
            table.add_section()
    table.caption = (
        "moved, priced: whole blocks; rows: the real tokens in them; skew: over an even spread"
    )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
                 padding=(0, 1, 0, 0))  # fmt: skip


def main(study: Study) -> None:
    check_target(study.json, study.plot)
    found = run(study)
    console = terminal()
    counted = [result for result in found if "phases" in result]
    tables = [time_table(found)] + ([byte_table(counted)] if counted else [])
    emit(console, study.json, found, *tables)
    if study.plot and counted:
        plot_meshes(counted, study.plot)
    wrong = faults(found)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if study.repeat > 1:
        ended = sum("error" not in result for result in found)
        print(f"{ended} of {len(found)} runs ended well", file=sys.stderr)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    leave(run_program(main, Study, __doc__))
