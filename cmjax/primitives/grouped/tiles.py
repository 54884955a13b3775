"""Groups of rows in tiles of one group each, so that work follows the rows that are there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32


def by_tiles(
    product: Callable[..., Array],
    x: Array,
    weights: Any,
    sizes: Int32[Array, "groups"],
    features: int,
    dtype: Any,
) -> Array:
    """`product(rows of one group, its weights)` for all groups; rows behind the last give zeros.

    Rows are laid out in tiles, of which a group has as many as its rows need; a loop runs over the
    tiles that are there, and takes the weights of a tile's group out of the stack.

    Args:
      product: of `[tile, k]` and a slice of `weights`, giving `[tile, features]` in `dtype`.
      x: `[rows, k]`, sorted by group.
      weights: a pytree of arrays with a leading axis of groups.
      sizes: rows of each group.
    """
    rows, groups = x.shape[0], sizes.shape[0]
    tile = _tile(rows, groups)
    most = min(rows, rows // tile + groups)
    ends = jnp.cumsum(sizes)
    needed = (sizes + (tile - 1)) // tile
    last = jnp.cumsum(needed)
    row = lax.iota(jnp.int32, rows)
    group = _group_of(row, ends)
    place = row - (ends - sizes)[group]
    at = (jnp.where(row < ends[-1], (last - needed)[group] + place // tile, most), place % tile)
    tiles = jnp.zeros((most, tile, x.shape[1]), x.dtype).at[at].set(x, mode="drop")
    group_of_tile = _group_of(lax.iota(jnp.int32, most), last)

    def one(i, y):
        take = lambda a, at: lax.dynamic_index_in_dim(a, at, 0, keepdims=False)  # noqa: E731
        of_group = jax.tree.map(lambda w: take(w, group_of_tile[i]), weights)
        found = product(take(tiles, i), of_group)
        return lax.dynamic_update_index_in_dim(y, found, i, 0)

    y = jnp.broadcast_to(_zero(x, weights, dtype), (most, tile, features))
    y = lax.fori_loop(0, jnp.minimum(last[-1], most), one, y)
    return y.at[at].get(mode="fill", fill_value=0)


def _zero(x, weights, dtype):
    """Zero that varies over mesh axes as a product of these operands does: a loop must not change
    its carry's type."""
    first = [a.reshape(-1)[0].astype(dtype) for a in (x, *jax.tree.leaves(weights))]
    return jnp.where(jnp.zeros((), bool), sum(first[1:], first[0]), jnp.zeros((), dtype))


def _tile(rows: int, groups: int) -> int:
    """Rows of a tile: a power of two, about as many as a group has on average, at most 64."""
    tile = 1
    while tile < 64 and 2 * tile * groups <= rows:
        tile *= 2
    return tile


def _group_of(places, ends):
    """The group that each place falls into; behind the last, the last."""
    found = jnp.sum(places[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    return jnp.minimum(found, ends.shape[0] - 1)
