"""Attention of the newest tokens over a cache in INT8, with a step per token and head (GQA, MQA).

    softmax(scale * q (s_k k)^T + mask) (s_v v)

The NPU dequantizes the cache in the kernel that attends it, and that is what is priced. On a CPU
the steps leave the sums, (s_k k) . q = s_k (k . q). Both read the cache as it lies, a byte per
element.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int8

from cmjax.primitives.attention import causal as kernel
from cmjax.primitives.attention.exact import attention_p
from cmjax.primitives.define import define
from cmjax.program import fused


def cached_attention(
    q: Float[Array, "batch q_len heads d"],
    k: Int8[Array, "batch kv_len kv_heads d"],
    k_scale: Float32[Array, "batch kv_len kv_heads"],
    v: Int8[Array, "batch kv_len kv_heads dv"],
    v_scale: Float32[Array, "batch kv_len kv_heads"],
    lengths: Int[Array, "batch"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "batch q_len heads dv"]:
    """Causal `attention` with keys `k * k_scale` and values `v * v_scale`.

    Args:
      q: queries; query `i` sits at position `lengths - q_len + i` and sees no later key.
      k, v: int8 keys and values; query head `h` reads key head `h * kv_heads // heads`.
      k_scale, v_scale: value of one step, per token and key head.
      lengths: cache entries that exist, the `q_len` newest ones included; the rest may hold
        anything.
      scale: factor on the scores.
      window: see `attention`.
    Returns: dtype of `q`.
    Raises: ValueError or TypeError naming the argument whose shape or dtype does not fit.
    Gradient: that of the formula; `k` and `v` are constants.
    Source: Ainslie et al. 2023 (arXiv:2305.13245), over a cache of steps and scales.
    Example: a cache of two tokens; the query weighs both alike.

      >>> k = v = jnp.array([1, 3], jnp.int8).reshape(1, 2, 1, 1)
      >>> ones, lengths = jnp.ones((1, 2, 1)), jnp.array([2])
      >>> q = jnp.zeros((1, 1, 2, 1))
      >>> cached_attention(q, k, ones, v, 10 * ones, lengths, scale=1.0).ravel().tolist()
      [20.0, 20.0]
    """
    operands = (q, k, k_scale, v, v_scale, lengths.astype(jnp.int32))
    params = {"scale": float(scale), "window": window}
    _check(*map(jax.typeof, operands))
    one = functools.partial(cached_attention_p.bind, **params)
    formula = fused("CachedAttention")(functools.partial(_reference, **params))
    return lax.platform_dependent(*operands, cpu=one, default=formula)


def dequantized(steps: Int8[Array, "*n d"], step: Float32[Array, "*n"], dtype) -> Array:
    """What a cache of int8 steps stands for, in `dtype`."""
    return (steps.astype(jnp.float32) * step[..., None]).astype(dtype)


def _reference(q, k, k_scale, v, v_scale, lengths, *, scale, window):
    k, v = dequantized(k, k_scale, q.dtype), dequantized(v, v_scale, q.dtype)
    return attention_p.bind(q, k, v, lengths, scale=scale, causal=True, window=window)


def _native(q, k, k_scale, v, v_scale, lengths, *, scale, window):
    options = {"scale": scale, "window": window}
    if kernel.kernel_serves(q, k, v, causal=True):
        return kernel.causal_attention(q, k, v, lengths, (k_scale, v_scale), **options)
    return _reference(q, k, k_scale, v, v_scale, lengths, **options)


def _check(q, k, k_scale, v, v_scale, lengths):
    for name, x, step in (("k", k, k_scale), ("v", v, v_scale)):
        if x.dtype != jnp.int8:
            raise TypeError(f"cached_attention: {name} must be int8, got {x.dtype}")
        if step.shape != x.shape[:-1] or step.dtype != jnp.float32:
            raise ValueError(
                f"cached_attention: {name}_scale must be float32{list(x.shape[:-1])}, one per "
                f"token and head of {name}, got {step.dtype}{list(step.shape)}"
            )


cached_attention_p = define("cm_cached_attention", _reference, native=_native)
