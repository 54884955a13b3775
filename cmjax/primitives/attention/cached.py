"""Attention of one new token of every sequence over its cache, through the C++ kernel.

XLA lays keys and values out anew for its products at every step; the kernel reads them where they
lie, up to the length that is there.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import native


def kernel_serves(q, k, v, lengths, causal: bool) -> bool:
    """Whether the kernel computes this attention: causal, of one query, with lengths.

    What one query does not see, the kernel does not read, so that nothing of it, such as a NaN, can
    get into the result. Several queries do not see the same keys.
    """
    one = q.shape[-3] == 1 and min(*q.shape, *k.shape, v.shape[-1]) > 0
    alike = q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16)
    return bool(lengths) and causal and one and alike


def cached_attention(q, k, v, lengths, *, scale: float, window: int | None):
    """`attention` with `causal=True` and `lengths`: see `cmjax.primitives.attention.exact`."""
    sequences = math.prod(q.shape[:-3])
    out = jax.ShapeDtypeStruct((sequences, q.shape[-2], v.shape[-1]), q.dtype)
    y = native.call(
        "cmjax_cached_attention",
        out,
        q.reshape(sequences, *q.shape[-2:]),
        k.reshape(sequences, *k.shape[-3:]),
        v.reshape(sequences, *v.shape[-3:]),
        lengths.reshape(sequences),
        scale=np.float32(scale),
        window=np.int64(-1 if window is None else window),
    )
    return y.reshape(*q.shape[:-1], v.shape[-1])
