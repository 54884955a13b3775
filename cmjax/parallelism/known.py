"""Branches and buffers whose condition or place may be known while a program is traced.

What is known makes no `lax.cond`: a pipeline of one stage is traced as straight code.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array


def both(a, b):
    """`a and b`, known while tracing if it can be."""
    if isinstance(a, bool | np.bool_):
        return b if a else False
    if isinstance(b, bool | np.bool_):
        return a if b else False
    return a & b


def choose(condition, yes: Callable, no: Callable | None = None):
    """`lax.cond`, of a condition that may be known; without `no`, zeros."""
    if no is None:
        shapes = jax.eval_shape(yes)
        no = lambda: zeros(shapes)  # noqa: E731
    if isinstance(condition, bool | np.bool_):
        return yes() if condition else no()
    return lax.cond(condition, yes, no)


def zeros(shapes):
    """Zeros of the shapes of a tree."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def take(buffer: Array, slot) -> Array:
    """An entry of the leading axis."""
    if isinstance(slot, int) or buffer.shape[0] == 1:
        return buffer[slot if isinstance(slot, int) else 0]
    return lax.dynamic_index_in_dim(buffer, slot, 0, keepdims=False)


def put(buffer: Array, slot, value: Array, here: Array | bool = True) -> Array:
    """`buffer` with an entry changed; unchanged where not `here`."""
    if isinstance(here, bool | np.bool_):
        if not here:
            return buffer
    else:
        slot = jnp.clip(slot, 0, buffer.shape[0] - 1)
        value = jnp.where(here, value, take(buffer, slot))
    slot = 0 if buffer.shape[0] == 1 else slot
    return lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), slot, 0)
