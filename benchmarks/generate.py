"""Generation on CPU: every arithmetic beside transformers and llama.cpp, and memory's bound.

    python -m benchmarks.generate                                # batches of 1, 4 and 16
    python -m benchmarks.generate --model deepseek --batches 1 --prompts 128
    python -m benchmarks.generate --peers-python PEERS/bin/python   # a Python that has the peers
    python -m benchmarks.generate --quick                        # two layers: does it run?
    python -m benchmarks.generate --json out/generate.json --plot out/generate.png

The peers are `pip install "cmjax[peers]"`, here or in a Python of their own; one that is absent is
left out with a line. All read one checkpoint of random weights. Every system is a process of its
own, so that its peak memory is its own; they take turns, so that their ratios are of one run. A
turn is a prefill and a few decode steps, greedy; the least time of a prefill and of a step over all
turns is what a system can do, whatever else the machine does. The bound is what a step has to read
(`benchmarks.generate_models.step_bytes`) over the rate at which `cmjax_sum_words` reads memory.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.generate_models import Family, step_bytes, write_model
from benchmarks.generate_plot import plot_decode
from cmjax.console import terminal
from cmjax.files import check_writable, replace_text
from cmjax.interrupt import leave
from cmjax.models import moe
from cmjax.options import run_program
from cmjax.report.figure_path import checked_path

OWN = (
    "float32",
    "bfloat16",
    "int8",
    "msd_w8a16",
    "msd_w4a16",
    "msd_w8a16_head8",
    "msd_w4a16_head8",
)
PEERS = ("transformers float32", "transformers bfloat16", "llama.cpp Q8_0", "llama.cpp Q4_0")
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    model: Family = "qwen"
    """Architecture: Qwen3-MoE (grouped-query attention) or DeepSeek-V3 (latent attention)."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Requests of a batch."""
    prompts: tuple[int, ...] = (128, 1024)
    """Tokens of every prompt."""
    steps: int = 16
    """Decode steps of a turn."""
    rounds: int = 4
    """Turns of each system, and one before them that is not counted."""
    arithmetics: tuple[str, ...] = OWN
    """What this library computes in."""
    peers: tuple[str, ...] = PEERS
    """Which peers to time; give none with `--peers` alone."""
    peers_python: Path = Path(sys.executable)
    """The Python that has the peers."""
    quick: bool = False
    """A model of two layers, one batch, 32 tokens and four steps, once."""
    json: Path | None = None
    """Write the numbers here as well."""
    plot: Path | None = None
    """Draw decoding here, as PNG or SVG."""

    def __post_init__(self):
        sizes = (*self.batches, *self.prompts, self.steps, self.rounds)
        if not (self.batches and self.prompts) or min(sizes) < 1:
            raise ValueError(
                "--batches, --prompts, --steps and --rounds must be positive, got "
                f"{self.batches}, {self.prompts}, {self.steps} and {self.rounds}"
            )
        for name in self.peers:
            if name not in PEERS:
                raise ValueError(f"--peers must be of {', '.join(PEERS)}, got {name!r}")
        for name in self.arithmetics:
            moe.Arithmetic.of(name)
        if not self.peers_python.is_file():
            raise ValueError(f"--peers-python {self.peers_python}: no such file")
        if self.json is not None:
            check_writable(self.json)
        if self.plot is not None:
            checked_path(self.plot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one system did with one batch.

    Fields:
      first_token_s: the prefill. decode_tokens_per_s: of all requests. bound_tokens_per_s: if
        reading what a step touches were all. peak_bytes: most resident memory during it.
    """

    system: str
    batch: int
    prompt: int
    first_token_s: float
    decode_tokens_per_s: float
    bound_tokens_per_s: float
    peak_bytes: int | None


class System:
    """A process that takes turns."""

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.loaded = self._answer()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def turn(self, prompts: np.ndarray, steps: int) -> dict[str, Any]:
        """A prefill and `steps` decode steps."""
        assert self._process.stdin is not None
        request = {"prompts": prompts.tolist(), "steps": steps}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        _, errors = self._process.communicate()
        last = (errors.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ValueError(f"{self.name} ended: {last}")


def main(options: Options) -> None:
    """Time and print."""
    console, layers = terminal(), None
    if options.quick:
        options = dataclasses.replace(options, batches=(1,), prompts=(32,), steps=4, rounds=1)
        layers = 2
    rate = _read_rate()
    console.print(f"memory is read at {rate / 1e9:.1f} GB/s")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        config = write_model(options.model, Path(folder), layers)
        systems = _open(options, folder, console)
        random = np.random.default_rng(0)
        for prompt in options.prompts:
            for batch in options.batches:
                prompts = random.integers(0, config.vocab_size, (batch, prompt))
                found = _take_turns(systems, prompts, options)
                best = max(rate, _read_rate())  # the machine may have been busy before
                rows, rate = [_bounded(row, best / rate) for row in rows], best
                for name, (first, step, peak) in found.items():
                    least = step_bytes(config, name, batch, prompt + options.steps // 2)
                    rows.append(
                        Row(
                            system=name,
                            batch=batch,
                            prompt=prompt,
                            first_token_s=first,
                            decode_tokens_per_s=batch / step,
                            bound_tokens_per_s=batch * rate / least,
                            peak_bytes=peak,
                        )
                    )
                console.print(_table([r for r in rows if (r.batch, r.prompt) == (batch, prompt)]))
                _save(options, rate, systems, rows)
        for system in systems:
            system.close()


def _bounded(row: Row, faster: float) -> Row:
    """The row with the bound of memory that is `faster` times as fast."""
    return dataclasses.replace(row, bound_tokens_per_s=faster * row.bound_tokens_per_s)


def _save(options: Options, rate: float, systems: list[System], rows: list[Row]) -> None:
    """Write what there is so far: a long run that is stopped has lost nothing."""
    if options.json is not None:
        report = {
            "read_bytes_per_s": rate,
            "model": options.model,
            "loaded": {system.name: system.loaded for system in systems},
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        replace_text(options.json, json.dumps(report, indent=1) + "\n")
    if options.plot is not None:
        plot_decode(rows, options.plot)


def _open(options: Options, folder: str, console: Console) -> list[System]:
    """The systems that are there, their weights in place."""
    most = str(max(options.batches)), str(max(options.prompts))
    worker = (sys.executable, "-m", "benchmarks.generate_worker")
    commands = {f"cmjax {a}": (*worker, a, folder, *most) for a in options.arithmetics}
    peer = (str(options.peers_python), str(HERE / "generate_peers.py"))
    commands = {name: (*peer, *name.split(), folder) for name in options.peers} | commands
    systems = []
    for name, command in commands.items():
        system = System(name, command)
        if "absent" in system.loaded:
            console.print(f"{name} is left out: {system.loaded['absent']}; see --peers-python")
            system.close()
            continue
        peak = _gigabytes(system.loaded["load_peak_bytes"])
        console.print(f"{name}: in place in {system.loaded['load_s']:.1f} s, peak {peak} GB")
        systems.append(system)
    return systems


def _take_turns(
    systems: list[System], prompts: np.ndarray, options: Options
) -> dict[str, tuple[float, float, int | None]]:
    """Least prefill and least step of each in seconds, and its peak memory."""
    for system in systems:
        system.turn(prompts, options.steps)
    found: dict[str, tuple[float, float, int | None]] = {}
    for _ in range(options.rounds):
        for system in systems:
            turn = system.turn(prompts, options.steps)
            new = (turn["prefill_s"], min(turn["steps_s"]), turn["peak_bytes"])
            old = found.get(system.name, (np.inf, np.inf, None))
            found[system.name] = (min(old[0], new[0]), min(old[1], new[1]), new[2])
    return found


def _read_rate() -> float:
    reads = System(
        "reads", (sys.executable, "-m", "benchmarks.generate_worker", "reads", "", "", "")
    )
    reads.close()
    return reads.loaded["bytes_per_s"]


def _table(rows: list[Row]) -> Table:
    peers = [row for row in rows if not row.system.startswith("cmjax")]
    title = f"batch {rows[0].batch}, prompts of {rows[0].prompt} tokens"
    keys = [f"{letter}: {peer.system}" for letter, peer in zip("abcd", peers, strict=False)]
    table = Table(title=title, caption=f"times as fast as {', '.join(keys)}" if keys else None)
    letters = [f"/{key[0]}" for key in keys]
    table.add_column("")
    columns = ("decode, tokens/s", "bound", "of it", *letters, "first token, s", *letters)
    for name in (*columns, "peak, GB"):
        table.add_column(name, justify="right")
    for row in rows:
        speed = row.decode_tokens_per_s
        table.add_row(
            row.system,
            f"{speed:,.1f}",
            f"{row.bound_tokens_per_s:,.0f}",
            f"{speed / row.bound_tokens_per_s:.0%}",
            *(f"{speed / peer.decode_tokens_per_s:.2f}" for peer in peers),
            f"{row.first_token_s:.3f}",
            *(f"{peer.first_token_s / row.first_token_s:.2f}" for peer in peers),
            _gigabytes(row.peak_bytes),
        )
    return table


def _gigabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f}"


if __name__ == "__main__":
    leave(run_program(main, Options, __doc__))
