"""Causal attention through the C++ kernel: of prompts, of new tokens over a cache, over latents.

XLA writes all scores of a prompt to memory, and lays keys and values of a cache out anew at every
step. The kernel keeps the scores of a block of queries in the processor's cache and reads keys and
values where they lie, as far as they are seen; INT8 ones are never dequantized in memory.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import native

_FLOATS = (jnp.float32, jnp.bfloat16)


def kernel_serves(q, k, v, causal: bool) -> bool:
    """Whether the kernel computes this attention: causal, of one float dtype or over int8.

    What a query does not see, such as a NaN, does not get into its result.
    """
    sizes = (*q.shape[-3:], *k.shape[-3:], v.shape[-1], math.prod(q.shape))
    kept = k.dtype == v.dtype and k.dtype in (q.dtype, jnp.int8)
    return causal and kept and q.dtype in _FLOATS and min(sizes) > 0


def causal_attention(q, k, v, lengths, steps=None, *, scale: float, window: int | None):
    """`attention` with `causal=True`: see `cmjax.primitives.attention.exact`. `lengths` may be
    `None`; `steps` are the values of the steps of int8 keys and values, `None` of others."""
    sequences = math.prod(q.shape[:-3])
    none = jnp.zeros((0,), jnp.float32)
    steps = (none, none) if steps is None else [each.reshape(-1) for each in steps]
    lengths = jnp.zeros((0,), jnp.int32) if lengths is None else lengths.reshape(sequences)
    y = native.call(
        "cmjax_attention",
        jax.ShapeDtypeStruct((sequences, *q.shape[-3:-1], v.shape[-1]), q.dtype),
        q.reshape(sequences, *q.shape[-3:]),
        k.reshape(sequences, *k.shape[-3:]),
        v.reshape(sequences, *v.shape[-3:]),
        lengths,
        *steps,
        scale=np.float32(scale),
        window=np.int64(-1 if window is None else window),
    )
    return y.reshape(*q.shape[:-1], v.shape[-1])


def latent_kernel_serves(q_latent, q_rope, latent, rope) -> bool:
    """Whether the kernel computes this attention over latents."""
    sizes = (*q_latent.shape, *latent.shape)
    floats = all(x.dtype in _FLOATS for x in (q_latent, q_rope, rope))
    return floats and latent.dtype in (*_FLOATS, jnp.int8) and min(sizes) > 0


def latent_causal_attention(q_latent, q_rope, latent, rope, lengths, steps, *, scale: float):
    """`latent_attention`: see `cmjax.primitives.attention.exact`. `steps` are the values of an
    int8 latent's steps, or `None`."""
    sequences = math.prod(q_latent.shape[:-3])
    steps = jnp.zeros((0,), jnp.float32) if steps is None else steps.astype(jnp.float32)
    y = native.call(
        "cmjax_latent_attention",
        jax.ShapeDtypeStruct((sequences, *q_latent.shape[-3:]), q_latent.dtype),
        q_latent.reshape(sequences, *q_latent.shape[-3:]),
        q_rope.reshape(sequences, *q_rope.shape[-3:]),
        latent.reshape(sequences, *latent.shape[-2:]),
        rope.reshape(sequences, *rope.shape[-2:]),
        lengths.reshape(sequences),
        steps.reshape(-1),
        scale=np.float32(scale),
    )
    return y.reshape(q_latent.shape)
