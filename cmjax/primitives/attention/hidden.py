"""Keys that do not count: those that no query may see, and those that are not finite.

What is hidden must not matter, whatever it holds: an unused entry of a cache may be anything, and a
weight of 0 times a NaN is a NaN. So hidden keys and values are replaced before they are used. A key
that is seen and not finite is replaced too, and the queries that see it get NaN: so a query that
does not see it has its own result, though it shares the products with those that do.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool


class Usable(NamedTuple):
    """Which keys count, and which turn what sees them into NaN."""

    kept: Bool[Array, "..."]  # seen by some query, and finite
    broken: Bool[Array, "..."]  # seen by some query, and not finite


def usable_keys(seen: Bool[Array, "*batch keys"], *arrays: Array) -> Usable:
    """Of keys that some query sees, those that are finite.

    Args:
      seen: by some query.
      arrays: [*batch, keys, d], what a key and its value are made of.
    """
    finite = jnp.asarray(True)
    for x in arrays:
        finite = finite & jnp.all(jnp.isfinite(x), axis=-1)
    return Usable(seen & finite, seen & ~finite)


def keep(x: Array, kept: Bool[Array, "*batch keys"]) -> Array:
    """`x` [*batch, keys, d] with zeros for the other keys."""
    return jnp.where(kept[..., None], x, jnp.zeros((), x.dtype))
