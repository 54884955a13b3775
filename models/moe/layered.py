"""Parameters and caches with an array for every layer, in programs that run layers one by one.

A stack of layers is scanned so that tracing does not grow with depth, but a scan copies a layer's
matrices out of the stack before they are multiplied: a decode step would read and write the whole
model on top of what it needs. Here the arrays of layers stay apart; the program stacks them in
name only, its scan is unrolled, and XLA finds that a slice of the stack is the array it was made
of. Compilation grows with depth instead.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cmjax.mesh import RANKED
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import param_specs

_STACKS = ("dense", "moe")  # of `main`


def split_layers(params: dict[str, Any], parallelism: Parallelism) -> dict[str, Any]:
    """`params` with a tuple of arrays, one a layer, in place of every stacked array of the main
    model. The stacks are taken out of `params`, so that memory is not needed twice."""
    specs = param_specs(params, parallelism)

    def split(tree: dict[str, Any], specs: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key in list(tree):
            leaf = tree.pop(key)
            if isinstance(leaf, dict):
                found[key] = split(leaf, specs[key])
            else:
                found[key] = _slices(leaf, 1 if specs[key] is RANKED else 0)
                del leaf
        return found

    main = params["main"]
    for name in _STACKS:
        if main.get(name):
            main[name] = {"layers": split(main[name]["layers"], specs["main"][name]["layers"])}
    return params


def are_split(params: dict[str, Any]) -> bool:
    """Whether `split_layers` made them."""
    return any(isinstance(x, tuple) for x in jax.tree.leaves(params, is_leaf=_is_tuple))


def split_shapes(params: dict[str, Any]) -> dict[str, Any]:
    """`split_layers` of one rank's shapes."""
    main = dict(params["main"])
    for name in _STACKS:
        if main.get(name):
            main[name] = jax.tree.map(
                lambda x: (jax.ShapeDtypeStruct(x.shape[1:], x.dtype),) * x.shape[0], main[name]
            )
    return params | {"main": main}


def is_stacked(path: Sequence[str | int]) -> bool:
    """Whether a parameter has an axis of layers that `split_layers` takes apart."""
    return path[0] == "main" and path[1] in _STACKS


def join_layers(params: dict[str, Any]) -> dict[str, Any]:
    """One rank's parameters as its program takes them: stacked, inside the program."""
    main = dict(params["main"])
    for name in _STACKS:
        if main.get(name):
            main[name] = jax.tree.map(jnp.stack, main[name], is_leaf=_is_tuple)
    return params | {"main": main}


def split_cache(cache: Any) -> Any:
    """A tuple of arrays, one a layer, for every array of one rank's cache."""
    return jax.tree.map(lambda x: tuple(x[i] for i in range(x.shape[0])), cache)


def join_cache(cache: Any) -> Any:
    """The cache that `split_cache` took apart."""
    return jax.tree.map(jnp.stack, cache, is_leaf=_is_tuple)


def _slices(x: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    index = (slice(None),) * axis
    return tuple(x[(*index, i)] for i in range(x.shape[axis]))


def _is_tuple(x: Any) -> bool:
    return isinstance(x, tuple)
