"""Which rows are so few that a call costs a CPU more than what it computes."""

import math

import jax.numpy as jnp
from jaxtyping import Array

_MOST_ROWS = 64


def is_few(x: Array) -> bool:
    """Whether `x [..., dim]` has 1 to 64 rows, of a dtype that the kernels of `cmjax.native` read.

    >>> is_few(jnp.zeros((2, 8, 5))), is_few(jnp.zeros((65, 5))), is_few(jnp.zeros((1, 5), int))
    (True, False, False)
    """
    known = all(isinstance(n, int) for n in x.shape) and x.dtype in (jnp.float32, jnp.bfloat16)
    return known and 0 < math.prod(x.shape[:-1]) <= _MOST_ROWS and x.shape[-1] > 0
