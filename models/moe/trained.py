"""What training changes of a model's parameters: not the tables of slots, which are integers."""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def trained(tree: Tree, like: Tree | None = None) -> Tree:
    """The leaves whose counterpart in `like` (by default their own) is in floating point; `None`
    for the others."""
    return jax.tree.map(
        lambda x, shape: x if jnp.issubdtype(shape.dtype, jnp.floating) else None,
        tree,
        tree if like is None else like,
    )


def with_tables(leaves: Tree, params: Tree) -> Tree:
    """`trained` leaves, and the tables of `params`."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, leaves, params, is_leaf=lambda x: x is None
    )
