"""Random parameters: standard normal numbers, drawn in few shapes."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

_SHORTEST = 1 << 16
_LONGEST = 1 << 24  # beyond, a row of its own costs less than twice the memory


def normal(key: Array, shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """The numbers of `jax.random.normal(key, shape)`, in float32.

        >>> same = jax.random.normal(jax.random.key(0), (2, 3), jnp.float32)
        >>> bool((normal(jax.random.key(0), (2, 3)) == same).all())
        True

    XLA compiles a draw anew for every shape, which takes longer than drawing. The i-th number of a
    row does not depend on the row's length (JAX's partitionable Threefry), so rows of a power of
    two are drawn, and cut.
    """
    size = math.prod(shape)
    if size > _LONGEST:
        return jax.random.normal(key, shape, jnp.float32)
    row = jax.random.normal(key, (max(_SHORTEST, 1 << (size - 1).bit_length()),), jnp.float32)
    return row[:size].reshape(shape)
