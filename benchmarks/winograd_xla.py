"""float32 Winograd convolution in plain XLA beside `lax.conv_general_dilated`, one thread.

    python -m benchmarks.winograd_xla

Forward with the filter transformed beforehand (`prepack`), as deployed, and transformed in every
call, as in training. All take turns in one process that is pinned to a core; the least CPU time
counts.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.table import Table

from benchmarks.timing import least_times
from cmjax.console import terminal
from cmjax.cores import keep_to_cores, usable_cores
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.primitives.convolution.packed import prepack
from cmjax.primitives.convolution.winograd import winograd_conv1d

SHAPES = (  # batch, frames, channels, taps
    (1, 400, 256, 3),
    (1, 400, 256, 5),
    (1, 400, 256, 7),
    (8, 200, 256, 7),
    (1, 1600, 256, 7),
    (1, 400, 512, 3),
    (1, 400, 512, 5),
    (1, 400, 512, 7),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    seconds: float = 3.0
    """Time for each shape."""


def _xla(x, w):
    layout = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=layout)


def _gradients(convolve):
    return jax.grad(lambda x, w: jnp.sum(convolve(x, w) ** 2), (0, 1))


def _call(fn, *operands):
    return lambda: jax.block_until_ready(fn(*operands))


def main(config: Config) -> None:
    keep_to_cores(usable_cores()[-1:])
    table = Table(title="float32: lax.conv in ms, and how many times faster Winograd in XLA is")
    for column in (
        "batch x frames, channels, taps",
        "lax.conv",
        "prepacked",
        "forward",
        "gradients",
    ):
        table.add_column(column, justify="right")
    for batch, frames, channels, taps in SHAPES:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(batch, frames, channels)), jnp.float32)
        w = jnp.asarray(rng.normal(size=(taps, channels, channels)), jnp.float32)
        candidates = {
            "xla": (_xla, w),
            "prepacked": (winograd_conv1d, prepack(w)),
            "forward": (winograd_conv1d, w),
            "xla gradients": (_gradients(_xla), w),
            "gradients": (_gradients(winograd_conv1d), w),
        }
        calls = {name: _call(jax.jit(fn), x, filters) for name, (fn, filters) in candidates.items()}
        least = least_times(calls, config.seconds)
        gains = (
            least["xla"] / least["prepacked"],
            least["xla"] / least["forward"],
            least["xla gradients"] / least["gradients"],
        )
        cells = [f"{1e3 * least['xla']:.2f}", *(f"{gain:.2f}" for gain in gains)]
        table.add_row(f"{batch} x {frames}, {channels}, {taps}", *cells)
    terminal().print(table)


if __name__ == "__main__":
    leave(run_program(main, Config, __doc__))
