"""Whole speech recognisers on this CPU: float32, int8 direct, int8 Winograd, and ONNX Runtime.

    python -m benchmarks.asr                    # Wav2letter and ConvDFSMN as published, one thread
    python -m benchmarks.asr --threads 2

Random weights, calibrated on random features. All candidates take turns in one process (see
`timing`); one thread: pinned to a core, CPU time; more: wall time. "whole" is speech to
logits, "network" features to logits, "backbone" the layers that a short algorithm can serve, each
by itself. ONNX Runtime has the exported network, in float32 and in its own int8.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table

from benchmarks.asr_onnx import quantized, session_call
from benchmarks.timing import least_times
from cmjax import native
from cmjax.console import terminal
from cmjax.cores import keep_to_cores, usable_cores
from cmjax.files import replace_text
from cmjax.interrupt import leave
from cmjax.models.asr.acoustic import AcousticModel, layer_algorithms
from cmjax.models.asr.conv import PRECISIONS
from cmjax.models.asr.deployed import backbone, backbone_call, network_call, whole_call
from cmjax.models.asr.dfsmn import ConvDFSMN, ConvDFSMNConfig
from cmjax.models.asr.export import network_to_onnx
from cmjax.models.asr.features import LogMel
from cmjax.models.asr.wav2letter import Wav2letter, Wav2letterConfig
from cmjax.options import run_program
from cmjax.primitives.convolution import calibrate

WINOGRAD = "int8-winograd"
PARTS = ("whole", "network", "backbone")
PAPER = {"whole": 1.48, "backbone": 1.92}  # Yao et al., ICASSP 2022, abstract: on ARMv7
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    threads: int = 1
    """Threads of every candidate."""
    networks: tuple[Literal["wav2letter", "dfsmn"], ...] = ("wav2letter", "dfsmn")
    """Networks, at their published (or, for ConvDFSMN, default) sizes."""
    kernel: int = 5
    """Taps of ConvDFSMN's dense convolutions."""
    length: int = 296
    """Feature frames of the utterance; 296 is the window of Arm's Wav2letter."""
    seconds: float = 5.0
    """Time for each network."""
    algorithm: str = "fast"
    """Short algorithm of the layers that have one; "auto" or "fast" choose per layer."""
    json: Path | None = None
    """Also write the seconds of every candidate there."""

    def __post_init__(self):
        counts = (self.threads, self.length, self.kernel)
        if min(counts) < 1 or not self.seconds > 0:
            raise ValueError(
                "--threads, --length and --kernel must be at least 1 and --seconds positive, got "
                f"{', '.join(map(str, counts))} and {self.seconds}"
            )


def main(options: Options) -> None:
    """Time and print."""
    keep_to_cores(usable_cores()[-options.threads :])
    console = terminal()
    clock = "CPU" if options.threads == 1 else "wall"
    console.print(f"{native.status().reason}; {options.threads} thread(s), {clock} time")
    found = {}
    for name in options.networks:
        runs, largest_error = candidates(name, options)
        flat = {(part, by): run for part, some in runs.items() for by, run in some.items()}
        least = least_times(flat, options.seconds, options.threads)
        found[name] = {part: {by: least[part, by] for by in some} for part, some in runs.items()}
        console.print(table(name, found[name], options.length))
        if largest_error is None:
            console.print("ONNX Runtime is not installed: no peer")
        else:
            console.print(f"exported network: float32 logits agree within {largest_error:.1e}")
    if options.json is not None:
        replace_text(options.json, json.dumps(found, indent=1) + "\n")


def candidates(name: str, options: Options) -> tuple[dict[str, dict[str, Run]], float | None]:
    """(part -> candidate -> call; largest relative error of the exported float32 network)."""
    model, front = build(name, options.kernel)
    length = options.length
    rng = np.random.default_rng(0)
    speech = jnp.asarray(rng.normal(size=(1, front.samples(length))) * 0.1, jnp.float32)
    speech_lengths = jnp.asarray([speech.shape[1]])
    features = jnp.asarray(rng.normal(size=(1, length, front.bands)), jnp.float32)
    lengths = jnp.asarray([length])
    inputs: list[jax.Array] = []
    model(features, lengths, watch=lambda conv, x, y: inputs.append(x.x))
    given = [inputs[i] for i in backbone(model)]
    runs: dict[str, dict[str, Run]] = {part: {} for part in PARTS}
    for precision in PRECISIONS:
        integers = nnx.clone(model)
        if precision != "float32":
            forms = layer_algorithms(model, precision, options.algorithm)
            for conv, x, form in zip(integers.convolutions(), inputs, forms, strict=True):
                padding = conv.padding(x.shape[1])
                conv.set_scales(
                    calibrate(
                        x, conv.kernel[...], algorithm=form, stride=conv.stride, padding=padding
                    )
                )
        integers.switch(precision)
        runs["whole"][precision] = _run(whole_call(integers, front), speech, speech_lengths)
        runs["network"][precision] = _run(network_call(integers), features, lengths)
        runs["backbone"][precision] = _run(backbone_call(integers), given)
    if not importlib.util.find_spec("onnxruntime") or not importlib.util.find_spec("onnx"):
        return runs, None
    exported = network_to_onnx(model, frames=length)
    sample = np.asarray(features)
    peers = {"ONNX Runtime float32": exported, "ONNX Runtime int8": quantized(exported, [sample])}
    calls = {peer: session_call(network, options.threads) for peer, network in peers.items()}
    for peer, call in calls.items():
        runs["network"][peer] = functools.partial(call, sample)
    ours = np.asarray(network_call(model)(features, lengths)[0])
    theirs = calls["ONNX Runtime float32"](sample)
    largest_error = float(np.abs(theirs - ours).max() / np.abs(ours).max())
    if not largest_error < 1e-3:
        raise AssertionError(f"the exported {name} is another network: off by {largest_error:.1e}")
    return runs, largest_error


def build(name: str, kernel: int) -> tuple[AcousticModel, LogMel]:
    """A network with random weights, and its front end."""
    front = LogMel(sample_rate=16000, bands=39 if name == "wav2letter" else 80)
    sizes = {"inputs": front.bands, "outputs": 29, "rngs": nnx.Rngs(0)}
    if name == "wav2letter":
        return Wav2letter(Wav2letterConfig(), **sizes), front
    return ConvDFSMN(ConvDFSMNConfig(kernel=kernel), **sizes), front


def table(network: str, seconds: dict[str, dict[str, float]], length: int) -> Table:
    """Milliseconds of every candidate, and how much faster int8-winograd is."""
    title = f"{network}, {length} frames: ms (int8-winograd is so much faster)"
    out = Table(title=title, caption="published, over int8 direct on ARMv7: " + _published())
    out.add_column("candidate")
    for part in PARTS:
        out.add_column(part, justify="right")
    for name in seconds["network"]:
        cells = [
            f"{1e3 * by_name[name]:.2f} ({by_name[name] / by_name[WINOGRAD]:.2f}x)"
            if name in by_name
            else ""
            for by_name in (seconds[part] for part in PARTS)
        ]
        out.add_row(name, *cells)
    return out


def _published() -> str:
    return ", ".join(f"{part} {gain}x" for part, gain in PAPER.items())


def _run(call: Callable, *args) -> Run:
    jax.block_until_ready(call(*args))  # compiled before it is timed
    return lambda: jax.block_until_ready(call(*args))


if __name__ == "__main__":
    leave(run_program(main, Options, __doc__))
