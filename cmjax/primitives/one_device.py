"""A program of one rank with another form for a device that holds every rank.

Ranks that talk lay out messages of static size, because each is a program of its own. Where all of
them are virtual ranks of one device (`cmjax.RankMesh` with one node) there is one program and
nothing travels: it may take the rows of all ranks at once, as many as there are. The program of a
rank stays the one that is written: it is what is priced and what is counted, and what runs wherever
there is more than one device.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from cmjax.primitives.define import define


def on_one_device(
    apart: Callable, together: Callable, *operands: Any, axes: tuple[str, ...]
) -> Any:
    """`apart(*operands)`; of all ranks of `axes` on one device, `together` of all ranks' operands.

    Args:
      apart: the program of one rank, of pytrees of arrays; it may use collectives over `axes`, and
        captures no arrays.
      together: the same, for pytrees whose arrays have a leading axis of ranks, row-major over
        `axes`; so has its result.
      axes: mesh axes that enumerate the ranks; `()` if there is one.
    Gradient: that of the form which runs.

    Example: a mean over ranks that is one sum, where `vmap` makes both of them.

      >>> mean = lambda x: lax.pmean(x, "npu")
      >>> whole = lambda x: jnp.broadcast_to(jnp.mean(x, axis=0, keepdims=True), x.shape)
      >>> rank = lambda x: on_one_device(mean, whole, x, axes=("npu",))
      >>> jax.vmap(rank, axis_name="npu")(jnp.array([1.0, 5.0])).tolist()
      [3.0, 3.0]
    """
    leaves, tree = jax.tree.flatten(operands)
    closed, out = jax.make_jaxpr(apart, return_shape=True)(*operands)

    def flat(*leaves):
        return jax.tree.leaves(together(*jax.tree.unflatten(tree, leaves)))

    found = on_one_device_p.bind(*leaves, apart=closed, together=flat, axes=tuple(axes), held=0)
    return jax.tree.unflatten(jax.tree.structure(out), found)


def _reference(*operands, apart: ClosedJaxpr, together, axes, held):
    """`axes` are those that `vmap` did not bind yet, of the others the operands have `held` axes,
    in front."""
    if math.prod(map(lax.axis_size, axes)) > 1:
        return jaxpr_as_fun(apart)(*operands)
    ranks = operands[0].shape[:held]
    found = together(*(x.reshape(math.prod(ranks), *x.shape[held:]) for x in operands))
    return [y.reshape(*ranks, *y.shape[1:]) for y in found]


def _batch(axis, operands, dims, *, apart, together, axes, held):
    """Of the innermost axis of ranks: the ranks along it are on this device."""
    named = axis.name in axes
    names = {"axis_name": axis.name} if named else {}
    mapped = jax.vmap(jaxpr_as_fun(apart), in_axes=tuple(dims), axis_size=axis.size, **names)
    if not named or axis.name != axes[-1]:
        out = mapped(*operands)
        return out, [0] * len(out)
    first = [
        jnp.broadcast_to(x, (axis.size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(operands, dims, strict=True)
    ]
    mapped = jax.vmap(jaxpr_as_fun(apart), axis_size=axis.size, **names)
    closed = jax.make_jaxpr(mapped)(*first)
    out = on_one_device_p.bind(
        *first, apart=closed, together=together, axes=axes[:-1], held=held + 1
    )
    return out, [0] * len(out)


on_one_device_p = define(
    "cm_on_one_device", _reference, batch=_batch, collective=True, multiple_results=True
)
