"""Sampling on the device: sort, cumulative sum, filter (CloudMatrix384 paper, section 4.2).

No random bits are drawn here: the caller passes uniform numbers, prepared with the rest of the
step's inputs, so a step is a pure function and repeats exactly.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32


def sample(
    logits: Float32[Array, "*batch vocab"],
    uniform: Float32[Array, "*batch"],
    temperature: Float32[Array, "*#batch"] | None,
    top_p: Float32[Array, "*#batch"] | None,
    top_k: Int32[Array, "*#batch"] | None = None,
) -> Int32[Array, "*batch"]:
    """Draw a token by inverse transform from the nucleus of `softmax(logits / temperature)`.

        >>> logits, half = jnp.array([[0.0, 2.0, 1.0]]), jnp.array([0.5])
        >>> sample(logits, half, temperature=jnp.zeros(1), top_p=jnp.ones(1)).tolist()
        [1]
        >>> sample(logits, jnp.array([0.9]), temperature=jnp.ones(1), top_p=jnp.ones(1)).tolist()
        [2]

    Args:
      logits: scores.
      uniform: numbers in [0, 1), one per draw.
      temperature: 0 means greedy; `None` means that for all, without sorting.
      top_p: the nucleus is the fewest most likely tokens whose probabilities reach `top_p`; at
        least one token.
      top_k: of the nucleus's tokens, first, only this many likeliest; `None` for no limit.
    """
    if temperature is None or top_p is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    cold = jnp.where(temperature > 0, temperature, 1)[..., None]
    tokens = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    keys, ranked = lax.sort((-logits / cold, tokens), dimension=-1, num_keys=1)
    if top_k is not None:
        keys = jnp.where(tokens < top_k[..., None], keys, jnp.inf)
    probability = jax.nn.softmax(-keys, axis=-1)
    reached = jnp.cumsum(probability, axis=-1)
    in_nucleus = (reached - probability < top_p[..., None]).at[..., 0].set(True)
    if top_k is not None:
        in_nucleus &= tokens < jnp.maximum(top_k, 1)[..., None]
    total = jnp.max(jnp.where(in_nucleus, reached, 0), axis=-1)
    below = (reached <= (uniform * total)[..., None]) & in_nucleus
    last = jnp.sum(in_nucleus, axis=-1, dtype=jnp.int32) - 1
    place = jnp.minimum(jnp.sum(below, axis=-1, dtype=jnp.int32), last)
    place = jnp.where(temperature > 0, place, 0)  # the first of the sorted is the greedy choice
    return jnp.take_along_axis(ranked, place[..., None], axis=-1)[..., 0]
