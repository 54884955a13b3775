"""Weights mapped from a file beside weights read from a checkpoint: start-up, memory, decoding.

    python -m benchmarks.packed --places /tmp /dev/shm

A model of random weights is written, and `cmjax generate` started on it: without a file, with one
that is not there yet, with one that is, with one whose time of change is another, so that its
values are checked, and with one that is there but not in memory. Then three processes decode in
turns, so that their ratios are of one run: one whose weights lie in huge pages of its own, and two
that map the same file; of each, what memory it alone holds (private) and its share of all it holds
(PSS). Programs are compiled before, as a first start leaves them.
"""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.generate import System
from benchmarks.generate_models import Family, write_model
from cmjax.console import terminal
from cmjax.interrupt import leave
from cmjax.models import moe
from cmjax.options import run_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    model: Family = "qwen"
    """Architecture: Qwen3-MoE or DeepSeek-V3."""
    arithmetic: str = "msd_w8a16"
    """What it computes in."""
    places: tuple[Path, ...] = (Path(tempfile.gettempdir()),)
    """Folders to keep the file in: what is mapped of a file system may lie in other pages."""
    rounds: int = 6
    """Turns of each process, and one before them that is not counted."""
    steps: int = 48
    """Decode steps of a turn."""
    starts: int = 3
    """Starts of each kind, of which the fastest counts."""

    def __post_init__(self):
        moe.Arithmetic.of(self.arithmetic)
        if min(self.rounds, self.steps, self.starts) < 1:
            raise ValueError(
                "--rounds, --steps and --starts must be positive, got "
                f"{self.rounds}, {self.steps} and {self.starts}"
            )
        for place in self.places:
            if not place.is_dir():
                raise ValueError(f"--places {place}: no such folder")


@dataclasses.dataclass(frozen=True)
class Start:
    """One start, to a second token."""

    weights_s: float
    """Until the weights are in place."""
    whole_s: float
    cpu_s: float
    peak_bytes: int


def main(options: Options) -> None:
    """Time and print."""
    console = terminal()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # elsewhere: a process counts its parent's peak as its own
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as elsewhere:
            elsewhere.submit(write_model, options.model, folder).result()
        _starts(options, folder, console)
        for place in options.places:
            with tempfile.TemporaryDirectory(dir=place) as own:
                _decode(options, folder, Path(own) / "packed", f"{place}", console)


def _starts(options: Options, folder: Path, console: Console) -> None:
    packed = folder / "packed"
    _start(options, folder, None)  # compiles
    found: dict[str, list[Start]] = {}
    for _ in range(options.starts):
        packed.unlink(missing_ok=True)
        kinds = {"without a file": None, "file written": packed, "file mapped": packed}
        for kind, path in kinds.items():
            found.setdefault(kind, []).append(_start(options, folder, path))
        packed.touch()
        found.setdefault("file mapped and checked", []).append(_start(options, folder, packed))
        _forget(packed)
        found.setdefault("file mapped, from disk", []).append(_start(options, folder, packed))
    size = packed.stat().st_size
    table = Table(title=f"{options.model}, {options.arithmetic}: a file of {size / 1e6:,.0f} MB")
    for column in ("start", "weights in place, s", "whole, s", "CPU, s", "peak, MB"):
        table.add_column(column, justify="left" if column == "start" else "right")
    for kind, starts in found.items():
        least = [min(getattr(start, f.name) for start in starts) for f in dataclasses.fields(Start)]
        *seconds, peak = least
        table.add_row(kind, *(f"{x:.2f}" for x in seconds), f"{peak / 1e6:,.0f}")
    console.print(table)


def _start(options: Options, folder: Path, packed: Path | None) -> Start:
    out = folder / "out.json"
    command = [sys.executable, "-m", "cmjax", "generate", "--weights", str(folder), "--json", out]
    command += ["--arithmetic", options.arithmetic, "--prompt-tokens", "1,2,3", "--new-tokens", "2"]
    command += ["--drafts", "0", *(["--packed", str(packed)] if packed else [])]
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=os.environ | {"CMJAX_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    whole_s = time.perf_counter() - started
    if process.returncode:
        raise ValueError(f"cmjax generate ended with {process.returncode}: {command}")
    weights_s = json.loads(out.read_text())["speed"]["load_s"]
    return Start(weights_s, whole_s, used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss)


def _forget(path: Path) -> None:
    """Have the system drop a file from memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _decode(options: Options, folder: Path, packed: Path, place: str, console: Console) -> None:
    worker = (sys.executable, "-m", "benchmarks.generate_worker", options.arithmetic, str(folder))
    worker += ("1", "128")
    systems = [System("in huge pages of its own", worker)]
    for name in "mapped", "mapped by a second process":
        systems.append(System(name, (*worker, str(packed))))
    prompts = np.random.default_rng(0).integers(0, 8192, (1, 128))  # of both vocabularies
    steps: dict[str, list[float]] = {system.name: [] for system in systems}
    for number in range(options.rounds + 1):
        for system in systems:
            turn = system.turn(prompts, options.steps)
            if number:
                steps[system.name].append(min(turn["steps_s"]))
    table = Table(title=f"decoding with a file in {place}")
    columns = ("decode, tokens/s", "ratio of turns, quartiles", "PSS, MB", "private", "huge pages")
    for column in ("weights", *columns):
        table.add_column(column, justify="left" if column == "weights" else "right")
    first = np.array(steps[systems[0].name])
    for system in systems:
        own = np.array(steps[system.name])
        low, high = np.quantile(first / own, (0.25, 0.75))
        rate, memory = 1 / own.min(), _memory(system.pid)
        sizes = (f"{memory[key] / 1e6:,.0f}" for key in ("pss", "private", "huge"))
        table.add_row(system.name, f"{rate:,.1f}", f"{low:.2f} to {high:.2f}", *sizes)
    console.print(table)
    for system in systems:
        system.close()


def _memory(pid: int) -> dict[str, int]:
    """Bytes of a process: its share, what it alone holds, and what lies in huge pages."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {key: 1024 * int(rest.split()[0]) for key, _, rest in (x.partition(":") for x in lines)}
    return {
        "pss": sizes["Pss"],
        "private": sizes["Private_Clean"] + sizes["Private_Dirty"],
        "huge": sizes["AnonHugePages"] + sizes["FilePmdMapped"],
    }


if __name__ == "__main__":
    leave(run_program(main, Options, __doc__))
