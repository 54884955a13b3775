"""Three measurements of a machine that is not what its file says.

    python -m studies.own_measurements

A machine's file says CloudMatrix384, with as little certainty as a purchaser has: memory bandwidth,
matrix rate, start-ups and jitter may be off by a third. The machine is another one: some of them
are off. `cmjax fit --rows` is given three decode steps measured on it, and predicts others, of
batches, contexts and microbatches that it has not seen.
"""

import dataclasses

import jax
import numpy as np
from rich.console import Console

from cmjax import predict
from cmjax.console import exit_code, terminal
from cmjax.cost.fit import update
from cmjax.cost.measured import Measurement
from cmjax.deploy.validation import measure_of
from cmjax.hardware import Supernode, Uncertainty, load_machine, replace_leaf
from cmjax.interrupt import leave

OFF = {
    "chip.hbm_bytes_per_s": 0.65,
    "chip.matrix_startup_s": 1.5,
    "efficiency.attention": 0.75,
    "efficiency.gemm": 0.8,
    "exchange.dispatch_startup_s": 1.4,
    "exchange.jitter_s": 2.0,
}
"""What the machine is times of what its file says."""
SPREAD = 0.35
MEASURED = ((16, 2048), (64, 4096), (96, 8192))
HELD = ((8, 4096), (32, 1024), (48, 8192), (96, 2048), (128, 4096))
"""Batch per NPU and context."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """Mean absolute relative errors of TPOT over `HELD`, before and after."""

    before: float
    after: float


def row(batch: int, context: int, tpot_ms: float) -> Measurement:
    command = f"predict decode --batch {batch} --context {context} --microbatches 1"
    what = f"batch {batch}, context {context}"
    return Measurement(what, "predict", tuple(command.split()), "tpot_ms", tpot_ms, "the machine")


def tpot_ms(machine: Supernode, batch: int, context: int) -> float:
    found = predict(
        "deepseek-r1", machine, phase="decode", batch=batch, context=context, microbatches=1
    )
    return float(found.tpot_s) * 1e3


def study() -> Errors:
    """What three measurements are worth."""
    said = load_machine("cloudmatrix384")
    truth = said
    for key, factor in OFF.items():
        head, _, name = key.partition(".")
        truth = replace_leaf(truth, key, getattr(getattr(said, head), name) * factor)
    before = Uncertainty(tuple(OFF), SPREAD**2 * np.eye(len(OFF)))
    rows = [row(b, c, tpot_ms(truth, b, c)) for b, c in MEASURED]
    measures = [measure_of(r, said) for r in rows]
    after = jax.tree.map(float, update(said, before, rows, measures, noise=0.01).machine)

    def error(machine: Supernode) -> float:
        wanted = np.array([tpot_ms(truth, b, c) for b, c in HELD])
        found = np.array([tpot_ms(machine, b, c) for b, c in HELD])
        return float(np.mean(np.abs(found / wanted - 1)))

    return Errors(error(said), error(after))


def main(console: Console) -> None:
    found = study()
    console.print(
        f"{len(HELD)} decode steps not measured: mean error {found.before:.1%} by the file, "
        f"{found.after:.1%} after {len(MEASURED)} measurements"
    )


if __name__ == "__main__":
    leave(exit_code(lambda: main(terminal())))
