"""Copies of tokens sorted by the slot they go to, on a device that holds every expert.

Where nothing travels, nothing needs the static blocks of `dispatch`: rows lie one slot after the
other, as many as there are, and the products with the experts' matrices follow them
(`cmjax.primitives.grouped`).
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from cmjax.primitives.exchange import quantize_rows


class SortedRows(NamedTuple):
    """A row for every copy of every token, in the order of slots."""

    rows: Array  # [rows, hidden], int8 steps of `scale`, or floating point
    scale: Float32[Array, "rows"] | None  # None if the rows are floating point
    slots: Int32[Array, "rows"]  # of each row
    sizes: Int32[Array, "slots"]  # rows of each slot
    place: Int32[Array, "tokens copies"]  # the row of each copy


def sort_by_slot(
    x: Float[Array, "tokens hidden"],
    slots: Int32[Array, "tokens copies"],
    count: int,
    *,
    quantize: bool,
) -> SortedRows:
    """Lay copies out in the order of their slots, of which there are `count`.

    >>> sent = sort_by_slot(jnp.array([[1.0], [2.0]]), jnp.array([[1], [0]]), 2, quantize=False)
    >>> sent.rows.tolist(), sent.sizes.tolist(), sent.place.tolist()
    ([[2.0], [1.0]], [1, 1], [[1], [0]])
    """
    tokens, copies = slots.shape
    flat = slots.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(flat).at[order].set(lax.iota(jnp.int32, tokens * copies))
    ends = jnp.searchsorted(flat[order], lax.iota(jnp.int32, count), side="right")
    sizes = jnp.diff(ends.astype(jnp.int32), prepend=0)
    token, scale = order // copies, None
    if quantize:
        x, scale = quantize_rows(x)
        scale = scale[token]
    return SortedRows(x[token], scale, flat[order], sizes, place.reshape(tokens, copies))


def unsort(
    rows: Float[Array, "rows hidden"], sent: SortedRows, weights: Float32[Array, "tokens copies"]
) -> Float[Array, "tokens hidden"]:
    """Every token's sum over its copies, weighted in float32; as `combine` adds them."""
    # rows and weights are made first: XLA would make them anew at every place, value by value
    rows, weights = lax.optimization_barrier((rows, weights))
    each = rows[sent.place]
    parts = [each[:, c].astype(jnp.float32) * weights[:, c, None] for c in range(each.shape[1])]
    return functools.reduce(jnp.add, parts).astype(rows.dtype)
