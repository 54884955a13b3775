"""Attention of one new token of every sequence over its cache, through the C++ kernel.

XLA lays keys and values out anew for its products at every step; the kernel reads them where they
lie, up to the length that is there.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import native

MOST_QUERIES = 1
"""New tokens of a sequence beyond which XLA's products are used: what one query does not see, the
kernel does not read, and so nothing of it, such as a NaN, can get into the result."""


def kernel_serves(q, k, v, lengths, causal: bool) -> bool:
    """Whether the kernel computes this attention: causal, of one query, with lengths."""
    few = q.shape[-3] <= MOST_QUERIES and min(*q.shape, *k.shape, v.shape[-1]) > 0
    alike = q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16)
    return bool(lengths) and causal and few and alike


def cached_attention(q, k, v, lengths, *, scale: float, window: int | None):
    """`attention` with `causal=True` and `lengths`: see `cmjax.primitives.attention.exact`."""
    sequences = math.prod(q.shape[:-3])

    def flat(x):
        return x.reshape(sequences, *x.shape[-3:])

    out = jax.ShapeDtypeStruct((sequences, *q.shape[-3:-1], v.shape[-1]), q.dtype)
    y = native.call(
        "cmjax_cached_attention",
        out,
        flat(q),
        flat(k),
        flat(v),
        lengths.reshape(sequences),
        scale=np.float32(scale),
        window=np.int64(-1 if window is None else window),
    )
    return y.reshape(*q.shape[:-1], v.shape[-1])
