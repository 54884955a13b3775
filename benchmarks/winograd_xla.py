"""float32 Winograd convolution in plain XLA beside `lax.conv_general_dilated`, one thread.

    python -m benchmarks.winograd_xla

Filters are transformed in every call, as in training. Both take turns in one process that is pinned
to a core; the least CPU time counts.
"""

import os
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table

from benchmarks.conv1d import least_times
from cmjax.primitives.winograd import winograd_conv1d

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
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    table = Table(title="float32, ms: lax.conv / Winograd in XLA (times faster)")
    for column in ("batch x frames, channels, taps", "forward", "gradients of x and w"):
        table.add_column(column)
    for batch, frames, channels, taps in SHAPES:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(batch, frames, channels)), jnp.float32)
        w = jnp.asarray(rng.normal(size=(taps, channels, channels)), jnp.float32)
        cells = []
        for of in (lambda f: f, _gradients):
            calls = {
                name: _call(jax.jit(of(convolve)), x, w)
                for name, convolve in (("xla", _xla), ("winograd", winograd_conv1d))
            }
            least = least_times(calls, time.process_time, config.seconds / 2)
            xla, ours = least["xla"], least["winograd"]
            cells.append(f"{1e3 * xla:.2f} / {1e3 * ours:.2f} ({xla / ours:.2f})")
        table.add_row(f"{batch} x {frames}, {channels}, {taps}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
