"""All-gather and reduce-scatter over a tensor-parallel group, each as one operation.

    gather:  y = concat(x_0, x_1, ...)            on every rank
    scatter: y_r = part r of sum over ranks of x

A pair of them does what an all-reduce does, with as many bytes, and leaves every rank its own part
of the tokens between the two (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2). Where
nothing but a norm lies between the two they may be one kernel, which is launched once: `joined`.
"""

import dataclasses

from jax import lax
from jaxtyping import Array, Float, Num

from cmjax.primitives.define import define
from cmjax.primitives.exchange import gather_ranks
from cmjax.program import Work, cost_rule, exchange


def gather_group(
    x: Num[Array, "own *rest"], axes: tuple[str, ...], *, joined: bool = False
) -> Num[Array, "gathered *rest"]:
    """Every rank's `x`, concatenated on axis 0 in rank order.

    Args:
      x: this rank's part.
      axes: mesh axes that enumerate the group's ranks; `()` gives `x` back.
      joined: it is the second half of an all-reduce whose first half was a `scatter_sum`, so that
        no kernel is launched for it. Changes no number.
    Gradient: that of the concatenation, a sum over the ranks.

    >>> import jax.numpy as jnp
    >>> gather_group(jnp.array([1.0, 2.0]), ()).tolist()
    [1.0, 2.0]
    """
    return gather_group_p.bind(x, axes=tuple(axes), joined=joined) if axes else x


def scatter_sum(
    x: Float[Array, "gathered *rest"], axes: tuple[str, ...]
) -> Float[Array, "own *rest"]:
    """The sum of every rank's `x`, of which this rank gets its part of axis 0.

    Args:
      x: as long on axis 0 as `gather_group` gives.
      axes: mesh axes that enumerate the group's ranks; `()` gives `x` back.
    Gradient: that of the sum, a concatenation over the ranks.

    >>> import jax.numpy as jnp
    >>> scatter_sum(jnp.array([1.0, 2.0]), ()).tolist()
    [1.0, 2.0]
    """
    return scatter_sum_p.bind(x, axes=tuple(axes)) if axes else x


def _scatter_reference(x, *, axes):
    # JAX does not batch a reduce-scatter over a tuple of axes; the outermost axis has the largest
    # blocks
    for axis in axes:
        x = lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
    return x


def _gather_reference(x, *, axes, joined):
    return gather_ranks(x, axes)


gather_group_p = define("cm_gather_group", _gather_reference, collective=True)
scatter_sum_p = define("cm_scatter_sum", _scatter_reference, collective=True)


@cost_rule(gather_group_p)
def _gather_cost(x, *, out, mesh, axes, joined) -> Work:
    """Each rank sends its part to every other directly (full mesh)."""
    work = Work(kind="collective", **exchange(out[0].nbytes, axes, mesh))
    return dataclasses.replace(work, launches=0.0) if joined else work


@cost_rule(scatter_sum_p)
def _scatter_cost(x, *, out, mesh, axes) -> Work:
    """Each rank sends every other its part directly, and adds what it receives."""
    return Work(
        kind="collective", vector_bytes=x.nbytes, flops=x.size, **exchange(x.nbytes, axes, mesh)
    )
