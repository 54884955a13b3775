"""Attention over parts of the keys, merged: split-KV decoding, sequence sharding, and sinks.

lse = log sum_p exp(lse_p),    out = sum_p exp(lse_p - lse) out_p
"""

import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array, Float


def merge_by_lse(
    out: Float[Array, "parts *batch q_len heads dv"], lse: Float[Array, "parts *batch q_len heads"]
) -> tuple[Float[Array, "*batch q_len heads dv"], Float[Array, "*batch q_len heads"]]:
    """Attention over all keys from attention over parts of them (split-KV, sequence sharding).

        lse = log sum_p exp(lse_p),    out = sum_p exp(lse_p - lse) out_p

    Args:
      out, lse: results of attention with `return_lse`, stacked on axis 0. A part in which a query
        sees nothing counts zero.
    Returns: the merged pair. Merging is associative up to rounding.
    Raises: ValueError if the shapes do not belong together.
    Source: FlashDecoding's reduction over splits of the keys.
    Example: the two halves of a cache, attended apart.

      >>> from cmjax.primitives import flash_attention
      >>> q, k = jnp.ones((1, 1, 8)), jnp.zeros((4, 1, 8))
      >>> v = jnp.arange(4.0)[:, None, None]
      >>> halves = (slice(0, 2), slice(2, 4))
      >>> parts = [flash_attention(q, k[half], v[half], return_lse=True) for half in halves]
      >>> out, lse = merge_by_lse(*map(jnp.stack, zip(*parts, strict=True)))
      >>> round(float(out[0, 0, 0]), 3)
      1.5
    """
    out, lse = jnp.asarray(out), jnp.asarray(lse)
    if out.ndim < 4 or out.shape[:-1] != lse.shape:
        raise ValueError(
            "merge_by_lse: out must be [parts, ..., q_len, heads, dv] and lse the same without dv, "
            f"got {out.shape} and {lse.shape}"
        )
    top = lax.stop_gradient(jnp.max(lse, axis=0))
    base = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(lse - base)
    mass = jnp.sum(weights, axis=0)
    some = jnp.where(mass == 0, 1, mass)
    merged = jnp.sum((weights / some)[..., None] * out, axis=0)
    return merged.astype(out.dtype), jnp.where(mass == 0, -jnp.inf, base + jnp.log(some))


def with_sinks(
    out: Float[Array, "*batch q_len heads dv"],
    lse: Float[Array, "*batch q_len heads"],
    sinks: Float[Array, "heads"],
) -> tuple[Float[Array, "*batch q_len heads dv"], Float[Array, "*batch q_len heads"]]:
    """Attention in whose softmax every head has one more score, of a key without a value.

        lse' = log(exp(lse) + exp(sink)),    out' = exp(lse - lse') out

    Args:
      out, lse: results of attention with `return_lse`.
      sinks: the scores.
    Returns: the pair with sinks, each in its dtype.
    Source: OpenAI 2025, gpt-oss model card (arXiv:2508.10925): a learned bias in the denominator.
    Example: a sink as strong as the one key takes half of its weight.

      >>> out, lse = with_sinks(jnp.ones((1, 1, 4)), jnp.zeros((1, 1)), jnp.zeros(1))
      >>> float(out[0, 0, 0]), round(float(lse[0, 0]), 4)
      (0.5, 0.6931)
    """
    sinks = sinks.astype(lse.dtype)
    kept = nn.sigmoid(lse - sinks)  # 0 for a query that sees nothing
    return (kept[..., None] * out).astype(out.dtype), jnp.logaddexp(lse, sinks)
