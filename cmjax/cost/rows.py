"""A step's time as a function of the rows on its slowest rank, fast enough to search with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.cost.price import price
from cmjax.hardware import Supernode
from cmjax.program.step import Step

_POINTS = 129


def row_time(step: Step, machine: Supernode, *, tokens: float) -> Callable[[Any], Any]:
    """`layer_time_s(rows_per_rank [..., ranks]) -> seconds [...]` of a MoE block.

    The slowest rank sets the time. The price is sampled at 129 row counts from none to all rows on
    one rank, evenly in their square root, and interpolated; it is piecewise linear in the rows, so
    only the few pieces that contain a kink are inexact.

    Args:
      step: a block whose sizes are `tokens` and `rows` (`cmjax.cost.deployment.build_layer`).
      machine: where it runs.
      tokens: tokens per rank and step.
    """
    program = step.trace()
    most = tokens * step.copies * step.ranks
    rows = np.linspace(0.0, 1.0, _POINTS) ** 2 * most
    with jax.enable_x64(True):

        def at(rows):
            return price(program, machine, step.symbols({"tokens": tokens, "rows": rows})).total_s

        seconds = np.asarray(jax.jit(jax.vmap(at))(jnp.asarray(rows)))

    def layer_time_s(rows_per_rank):
        slowest = jnp.max(rows_per_rank, axis=-1)
        return jnp.interp(slowest, jnp.asarray(rows), jnp.asarray(seconds), right="extrapolate")

    return layer_time_s
