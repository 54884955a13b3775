"""A step's time as a function of the rows on its slowest rank, fast enough to search with.

A dispatch kernel may send a token to a rank once, whatever experts of its are there, and the rank
return their weighted sum. A token whose k experts are chosen independently, each on rank r with the
share p = x[r] / sum(x) of the rows x, then crosses the links as

    d[r] = sum(x) / k · (1 - (1 - p)**k)    rows, in place of x[r],

which needs counts only. Experts that are chosen together more often than that, and share a rank,
save more.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.cost.price import price
from cmjax.deploy.step import MoEStep
from cmjax.hardware import Supernode

_POINTS = 129


def row_time(
    step: MoEStep, machine: Supernode, *, tokens: float, once_per_rank: bool = False
) -> Callable[[Any], Any]:
    """`layer_time_s(rows_per_rank [..., ranks]) -> seconds [...]` of a MoE block.

    The slowest rank sets the time. The price is sampled at 129 row counts from none to all rows on
    one rank, evenly in their square root, and interpolated; it is piecewise linear in the rows, so
    only the few pieces that contain a kink are inexact.

    Args:
      step: a block whose sizes are `tokens` and `rows` (`cmjax.deploy.moe_step.build_layer`).
      machine: where it runs.
      tokens: tokens per rank and step.
      once_per_rank: a token goes to a rank once and comes back summed (independent experts, see
        the module's docstring); else every row crosses for itself, as FusedDispatch sends them.
    """
    program = step.trace()
    copies = step.copies
    most = tokens * copies * step.ranks
    rows = np.linspace(0.0, 1.0, _POINTS) ** 2 * most
    with jax.enable_x64(True):

        def at(rows):
            timeline = price(program, machine, step.symbols({"tokens": tokens, "rows": rows}))
            crossing = sum(
                jnp.sum(jnp.where(part.fabric > 0, part.total, 0.0)) for part in timeline.parts
            )
            return timeline.total_s, crossing

        seconds, crossing = map(np.asarray, jax.jit(jax.vmap(at))(jnp.asarray(rows)))

    def between(at, values):
        return jnp.interp(at, jnp.asarray(rows), jnp.asarray(values), right="extrapolate")

    def layer_time_s(rows_per_rank):
        slowest = jnp.max(rows_per_rank, axis=-1)
        if not once_per_rank:
            return between(slowest, seconds)
        total = jnp.maximum(jnp.sum(rows_per_rank, axis=-1), 1e-30)
        arriving = total / copies * (1 - (1 - jnp.minimum(slowest / total, 1)) ** copies)
        return between(slowest, seconds - crossing) + between(arriving, crossing)

    return layer_time_s
