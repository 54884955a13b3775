"""1-D convolution: the int8 and int16 kernels beside XLA and other libraries.

    python -m benchmarks.conv1d                      # one thread, all shapes, and Wav2letter
    python -m benchmarks.conv1d --threads 2 --json conv1d.json

All candidates of a row take turns of several calls in one process. One thread: pinned to a core,
the least CPU time of the process; more: the least wall time, and a rest before each turn, because
the threads of some libraries spin for a while after a call, on the cores of the next. Ours and the
float32 peers take and give float32, int8 peers (see `conv_peers`) 8-bit activations.
CMJAX_NATIVE_ISA=avx2 restricts our kernels; for peers there are ONEDNN_MAX_CPU_ISA=AVX2 and
XLA_FLAGS=--xla_cpu_max_isa=AVX2, for ONNX Runtime nothing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.conv_peers import Run, Shape, peers
from benchmarks.timing import least_times
from cmjax import native
from cmjax.console import terminal
from cmjax.cores import keep_to_cores, usable_cores
from cmjax.files import replace_text
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.primitives.convolution import calibrate
from cmjax.primitives.convolution.packed import prepack
from cmjax.primitives.convolution.winograd import winograd_conv1d

LAYERS = ((256, 256, 7), (256, 256, 5), (250, 250, 7), (512, 512, 3), (512, 512, 5), (512, 512, 7))
LENGTHS = ((1, 148), (1, 400), (1, 1600), (8, 200))  # batch, frames
LONG = (250, 2000, 32)

SHAPES = tuple(
    Shape(batch=batch, length=length, cin=cin, cout=cout, taps=taps)
    for cin, cout, taps in LAYERS
    for batch, length in LENGTHS
) + tuple(
    Shape(batch=1, length=length, cin=LONG[0], cout=LONG[1], taps=LONG[2]) for length in (148, 400)
)

# Arm's Wav2letter on 296 frames (ARM-software/ML-zoo): how many of each layer. The backbone is the
# layers with more than one tap and stride 1.
WAV2LETTER = (
    (1, Shape(batch=1, length=296, cin=39, cout=250, taps=48, stride=2)),
    (7, Shape(batch=1, length=148, cin=250, cout=250, taps=7)),
    (1, Shape(batch=1, length=148, cin=250, cout=2000, taps=32)),
    (1, Shape(batch=1, length=148, cin=2000, cout=2000, taps=1)),
    (1, Shape(batch=1, length=148, cin=2000, cout=29, taps=1)),
)

XLA, DIRECT, INT8, INT16 = "XLA f32", "direct int8", "Winograd int8", "Winograd int16"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    threads: int = 1
    """Threads of every candidate."""
    seconds: float = 3.0
    """Time for each shape."""
    what: Literal["all", "layers", "wav2letter"] = "all"
    """Which tables."""
    json: Path | None = None
    """Also write the seconds of every candidate and shape there."""


def algorithm(taps: int) -> str:
    """The fast algorithm that is timed for a filter; nothing is gained on a single tap."""
    known = {1: "direct", 3: "F(4,3)-lavin", 5: "F(4,5)"}
    return known.get(taps, "N88")


def main(config: Config) -> None:
    keep_to_cores(usable_cores()[-config.threads :])
    builders = ours() | peers(config.threads)
    console = terminal()
    console.print(
        f"{native.status().reason}; {config.threads} thread(s), "
        f"{'CPU' if config.threads == 1 else 'wall'} time"
    )
    network = [shape for _, shape in WAV2LETTER] if config.what != "layers" else []
    layers = list(SHAPES) if config.what != "wav2letter" else []
    times: dict[Shape, dict[str, float]] = {}
    for shape in track(dict.fromkeys(layers + network), "measuring", console=Console(stderr=True)):
        runs = {name: build(shape) for name, build in builders.items()}
        times[shape] = least_times(runs, config.seconds, config.threads)
    if layers:
        console.print(layer_table({shape: times[shape] for shape in layers}))
        for line in shares({shape: times[shape] for shape in layers}):
            console.print(line)
    if network:
        console.print(network_table(times))
    if config.json is not None:
        seconds = {str(shape): row for shape, row in times.items()}
        status = native.status()
        result = {"isa": status.isa, "threads": config.threads, "seconds": seconds}
        replace_text(config.json, json.dumps(result, indent=1) + "\n")


def ours() -> dict[str, Callable[[Shape], Run]]:
    """XLA's convolution and this library's, through their public functions."""
    return {
        XLA: _xla,
        DIRECT: lambda shape: _quantized(shape, "direct", "int8"),
        INT8: lambda shape: _quantized(shape, algorithm(shape.taps), "int8"),
        INT16: lambda shape: _quantized(shape, algorithm(shape.taps), "int16"),
    }


def layer_table(times: dict[Shape, dict[str, float]]) -> Table:
    """Milliseconds of every candidate, and what int8 Winograd gains over each."""
    table = Table(title="Conv1D, ms (gain of Winograd int8)")
    table.add_column("batch x frames, channels, taps")
    for name in next(iter(times.values())):
        table.add_column(name, justify="right")
    for shape, row in times.items():
        cells = [f"{1e3 * t:.2f} ({t / row[INT8]:.2f})" for t in row.values()]
        table.add_row(str(shape), *cells)
    return table


def shares(times: dict[Shape, dict[str, float]]) -> list[str]:
    """How often the gains reach what is hoped for."""
    lines = []
    for name in next(iter(times.values())):
        gains = np.array([row[name] / row[INT8] for row in times.values()])
        goal = 3.5 if name == XLA else 1.7
        if name not in (INT8, INT16):
            lines.append(
                f"Winograd int8 over {name}: {gains.min():.2f} to {gains.max():.2f}, "
                f"at least {goal} on {np.mean(gains >= goal):.0%} of {len(gains)} shapes"
            )
        if name == "ORT int8":
            direct = np.array([row[name] / row[DIRECT] for row in times.values()])
            lines.append(
                f"direct int8 over {name}: {direct.min():.2f} to {direct.max():.2f}, "
                f"geometric mean {np.exp(np.log(direct).mean()):.2f}"
            )
    return lines


def network_table(times: dict[Shape, dict[str, float]]) -> Table:
    """Sums over Wav2letter's layers, and the gain over direct int8."""
    table = Table(title="Wav2letter, 148 output frames: ms (times faster than direct int8)")
    table.add_column("candidate")
    parts = {
        "backbone": [(n, shape) for n, shape in WAV2LETTER if shape.taps > 1 and shape.stride == 1],
        "whole": list(WAV2LETTER),
    }
    for part in parts:
        table.add_column(part, justify="right")
    for name in next(iter(times.values())):
        cells = []
        for layers in parts.values():
            total, direct = (sum(n * times[s][key] for n, s in layers) for key in (name, DIRECT))
            cells.append(f"{1e3 * total:.2f} ({direct / total:.2f})")
        table.add_row(name, *cells)
    return table


def _float_operands(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(shape.batch, shape.length, shape.cin)), 0)
    w = rng.normal(size=(shape.taps, shape.cin, shape.cout)) / np.sqrt(shape.taps * shape.cin)
    bias = rng.normal(size=shape.cout)
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(bias, jnp.float32)


def _xla(shape: Shape) -> Run:
    operands = _float_operands(shape)

    @jax.jit
    def conv(x, w, bias):
        layout = ("NWC", "WIO", "NWC")
        pads = (shape.padding,)
        y = lax.conv_general_dilated(x, w, (shape.stride,), pads, dimension_numbers=layout)
        return jnp.maximum(y + bias, 0)

    return lambda: conv(*operands).block_until_ready()


def _quantized(shape: Shape, algorithm: str, domain: Literal["int8", "int16"]) -> Run:
    x, w, bias = _float_operands(shape)
    stride = shape.stride
    scales = calibrate(x, w, algorithm=algorithm, domain=domain, method="max", stride=stride)
    packed = prepack(w, scales, stride=stride)

    @jax.jit
    def conv(x, packed, bias):
        return winograd_conv1d(x, packed, bias=bias, activation="relu", padding=shape.padding)

    return lambda: conv(x, packed, bias).block_until_ready()


if __name__ == "__main__":
    leave(run_program(main, Config, __doc__))
