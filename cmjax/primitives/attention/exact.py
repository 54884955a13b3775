"""Attention as two primitives: over keys and values, and over a latent cache (absorbed MLA).

    softmax(scale * q k^T + mask) v                      float32 softmax, grouped query heads

`latent_attention` is the multi-head latent attention of DeepSeek-V2 (Liu et al. 2024, section 2.1)
in its absorbed form: all heads share one latent per token, which is both key and value, plus one
rotary key. On the NPU each is one fused kernel (FA), so each is one equation of a jaxpr.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from cmjax.primitives.attention import causal as kernel
from cmjax.primitives.attention.hidden import keep, usable_keys
from cmjax.primitives.define import define
from cmjax.program import Size, Work, cost_rule, matmul_flops
from cmjax.program.size import minimum

_MASKED = -1e30  # finite, so that a fully masked row stays free of NaN


def attention(
    q: Float[Array, "batch q_len heads d"],
    k: Float[Array, "batch kv_len kv_heads d"],
    v: Float[Array, "batch kv_len kv_heads dv"],
    *,
    scale: float,
    causal: bool,
    lengths: Int[Array, "batch"] | None = None,
    window: int | None = None,
) -> Float[Array, "batch q_len heads dv"]:
    """Scaled dot-product attention; `heads` is a multiple of `kv_heads` (GQA, MQA).

    Args:
      q, k, v: queries, keys, values; query head `h` reads key head `h * kv_heads // heads`.
      scale: factor on the scores, usually `d ** -0.5`.
      causal: query `i` sits at position `lengths - q_len + i` (`kv_len - q_len + i` without
        lengths) and sees no later key.
      lengths: keys that exist, per sequence; the rest is masked, and may hold anything.
      window: a query sees this many newest keys, the one at its own position included (sliding
        window); needs `causal`. `None` for all.
    Returns: dtype of `q`. A query that sees nothing gets zeros; one that sees a key or value that
      is not finite, NaN; what it does not see has no part in its result.
    Raises: ValueError or TypeError naming the argument whose shape or dtype does not fit.
    Gradient: that of the formula, made of the weights as they were rounded to the dtype of `v`.
    Source: Vaswani et al. 2017, equation 1: softmax(scale q k^T) v.
    Example: equal scores, so each query averages the values that it may see.

      >>> q = k = jnp.zeros((1, 3, 1, 4))
      >>> v = jnp.array([0.0, 1.0, 5.0]).reshape(1, 3, 1, 1)
      >>> attention(q, k, v, scale=0.5, causal=True).ravel().tolist()
      [0.0, 0.5, 2.0]
    """
    operands = (q, k, v) if lengths is None else (q, k, v, lengths.astype(jnp.int32))
    params = {"scale": float(scale), "causal": bool(causal), "window": window}
    _check(*map(jax.typeof, operands), **params)
    return attention_p.bind(*operands, **params)


def latent_attention(
    q_latent: Float[Array, "batch q_len heads c"],
    q_rope: Float[Array, "batch q_len heads r"],
    latent: Array,
    latent_scale: Float32[Array, "batch kv_len"] | None,
    rope: Float[Array, "batch kv_len r"],
    lengths: Int[Array, "batch"],
    *,
    scale: float,
) -> Float[Array, "batch q_len heads c"]:
    """Causal attention of absorbed queries over a latent cache: `softmax(scale * s) latent`.

        s = q_latent . latent + q_rope . rope,     query i at position lengths - q_len + i

    Args:
      q_latent: queries with the key up-projection absorbed.
      q_rope: rotated part of the queries.
      latent: [batch, kv_len, c], floating point, or int8 with `latent_scale`.
      latent_scale: value of one int8 step, per token; `None` for a floating-point latent.
      rope: rotated keys, shared by all heads.
      lengths: cache entries that exist, the `q_len` newest ones included; the rest may hold
        anything.
      scale: factor on the scores.
    Returns: attention-weighted latents, dtype of `q_latent`.
    Raises: ValueError or TypeError naming the argument whose shape or dtype does not fit.
    Gradient: that of the formula; int8 latents are constants.
    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C: the absorbed form of MLA.
    Example: a cache of two tokens; the query weighs both alike.

      >>> query = {"q_latent": jnp.zeros((1, 1, 2, 4)), "q_rope": jnp.zeros((1, 1, 2, 2))}
      >>> cache = {"latent": jnp.array([[[1.0] * 4, [3.0] * 4]]), "rope": jnp.zeros((1, 2, 2))}
      >>> lengths = jnp.array([2])
      >>> y = latent_attention(**query, **cache, latent_scale=None, lengths=lengths, scale=1.0)
      >>> y.shape, float(y[0, 0, 0, 0])
      ((1, 1, 2, 4), 2.0)
    """
    quantized = latent_scale is not None
    operands = (q_latent, q_rope, latent, rope, lengths.astype(jnp.int32))
    if latent_scale is not None:
        operands = (*operands, latent_scale)
    params = {"scale": float(scale), "quantized": quantized}
    _check_latent(*map(jax.typeof, operands), **params)
    return latent_attention_p.bind(*operands, **params)


def _reference(q, k, v, *lengths, scale, causal, window):
    *lead, q_len, heads, d = q.shape
    kv_len, kv_heads = k.shape[-3:-1]
    grouped = q.reshape(*lead, q_len, kv_heads, heads // kv_heads, d)
    visible = visible_keys(q_len, kv_len, lengths[0] if lengths else None, causal, window)
    lost = None
    if visible is not None:
        usable = usable_keys(jnp.any(visible, axis=-2)[..., None], k, v)  # [..., kv_len, kv_heads]
        k, v = keep(k, usable.kept), keep(v, usable.kept)
        broken = jnp.moveaxis(usable.broken, -1, -2)[..., None, :]
        lost = jnp.any(visible[..., None, :, :] & broken, axis=-1)  # [..., kv_heads, q_len]
        visible = visible[..., None, None, :, :]
    scores = scale * _product("...qhgd,...khd->...hgqk", grouped, k)
    weights = _softmax(scores, visible, v.dtype)
    out = _product("...hgqk,...khd->...qhgd", weights, v)
    if lost is not None:
        out = jnp.where(jnp.swapaxes(lost, -1, -2)[..., None, None], jnp.nan, out)
    return out.reshape(*lead, q_len, heads, v.shape[-1]).astype(q.dtype)


def _native(q, k, v, *lengths, scale, causal, window):
    if kernel.kernel_serves(q, k, v, causal):
        given = lengths[0] if lengths else None
        return kernel.causal_attention(q, k, v, given, scale=scale, window=window)
    return _reference(q, k, v, *lengths, scale=scale, causal=causal, window=window)


def _latent_reference(q_latent, q_rope, latent, rope, lengths, *latent_scale, scale, quantized):
    if quantized:
        latent = latent.astype(q_latent.dtype) * latent_scale[0][..., None].astype(q_latent.dtype)
    visible = visible_keys(q_latent.shape[-3], latent.shape[-2], lengths, causal=True)
    assert visible is not None
    usable = usable_keys(jnp.any(visible, axis=-2), latent, rope)
    latent, rope = keep(latent, usable.kept), keep(rope, usable.kept)
    lost = jnp.any(visible & usable.broken[..., None, :], axis=-1)
    scores = _product("...qhc,...kc->...hqk", q_latent, latent)
    scores += _product("...qhr,...kr->...hqk", q_rope, rope)
    weights = _softmax(scale * scores, visible[..., None, :, :], latent.dtype)
    found = _product("...hqk,...kc->...qhc", weights, latent)
    found = jnp.where(lost[..., None, None], jnp.nan, found)
    return found.astype(q_latent.dtype)


def _latent_native(q_latent, q_rope, latent, rope, lengths, *latent_scale, scale, quantized):
    operands = q_latent, q_rope, latent, rope
    steps = latent_scale[0] if quantized else None
    if kernel.latent_kernel_serves(*operands):
        return kernel.latent_causal_attention(*operands, lengths, steps, scale=scale)
    return _latent_reference(*operands, lengths, *latent_scale, scale=scale, quantized=quantized)


def _product(spec, a, b):
    """`einsum` in float32. XLA on CPU has no bfloat16 product with a float32 result for all shapes;
    widened operands give the same, for products of them are exact in float32."""
    wide = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    if jnp.result_type(a, b).itemsize >= 4:
        return wide(a, b)

    def either(a, b):
        return lax.platform_dependent(
            a, b, cpu=lambda a, b: wide(a.astype(jnp.float32), b.astype(jnp.float32)), default=wide
        )

    # a backward pass keeps the operands, not what each platform makes of them
    return jax.checkpoint(either, prevent_cse=False)(a, b)


def visible_keys(q_len, kv_len, lengths, causal, window=None):
    """Which keys each query may see, `[..., q_len, kv_len]`; None for all of them."""
    if lengths is None and not causal:
        return None
    key = lax.broadcasted_iota(jnp.int32, (q_len, kv_len), 1)
    query = lax.broadcasted_iota(jnp.int32, (q_len, kv_len), 0)
    if lengths is None:
        return _behind(key, query + (kv_len - q_len), window)
    lengths = lengths[..., None, None]
    visible = key < lengths
    return visible & _behind(key, query + (lengths - q_len), window) if causal else visible


def _behind(key, position, window):
    """Keys up to a query's position, and with a window only the newest of them."""
    behind = key <= position
    return behind if window is None else behind & (key > position - window)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _softmax(scores, visible, dtype):
    """Weights of the keys in `dtype`, zero where they are hidden."""
    if visible is None:
        return jax.nn.softmax(scores, axis=-1).astype(dtype)
    scores = jnp.where(visible, scores, _MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    mass = jnp.where(visible, jnp.exp(scores - top), 0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return (mass / jnp.where(total == 0, 1, total)).astype(dtype)


@_softmax.defjvp
def _softmax_slope(dtype, primals, tangents):
    """dw = w (ds - sum(w ds)). It is made of the weights alone: a backward pass keeps them, which
    the product with the values needs anyway, and nothing else of the scores' size."""
    scores, visible = primals
    weights = _softmax(scores, visible, dtype)

    def slope(weights, tangent):
        w = weights.astype(scores.dtype)
        return (w * (tangent - jnp.sum(w * tangent, axis=-1, keepdims=True))).astype(dtype)

    # widened weights are computed again, not kept beside the narrow ones
    again = slope if scores.dtype == dtype else jax.checkpoint(slope, prevent_cse=False)
    return weights, again(weights, tangents[0])


def _check(q, k, v, *lengths, scale, causal, window):
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"attention: window must be at least 1 key and needs causal=True, got window={window} "
            f"and causal={causal}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 4:
            raise ValueError(f"attention: {name} must be [batch, length, heads, d], got {x.shape}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads % kv_heads:
        raise ValueError(
            f"attention: heads must be a multiple of kv_heads, got {heads} query heads and "
            f"{kv_heads} key heads"
        )
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            "attention: q and k must agree in d, and k and v in all but d, "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )


def _check_latent(q_latent, q_rope, latent, rope, lengths, *latent_scale, scale, quantized):
    if q_latent.shape[:-1] != q_rope.shape[:-1] or latent.shape[:-1] != rope.shape[:-1]:
        raise ValueError(
            "latent_attention: q_latent and q_rope, and latent and rope, must agree in all but the "
            f"last axis, got {q_latent.shape}, {q_rope.shape}, {latent.shape}, {rope.shape}"
        )
    if q_latent.shape[-1] != latent.shape[-1] or q_rope.shape[-1] != rope.shape[-1]:
        raise ValueError(
            "latent_attention: the last axes of q_latent and latent, and of q_rope and rope, must "
            f"be equal, got {q_latent.shape}, {latent.shape}, {q_rope.shape}, {rope.shape}"
        )
    if quantized != (latent.dtype == jnp.int8):
        raise ValueError(
            "latent_attention: an int8 latent needs latent_scale, a floating-point one must not "
            f"have it; got a {latent.dtype} latent {'with' if quantized else 'without'} one"
        )


attention_p = define("cm_attention", _reference, check=_check, native=_native)
latent_attention_p = define(
    "cm_latent_attention", _latent_reference, check=_check_latent, native=_latent_native
)


# Vector instructions per score, in float32: scale, running maximum, subtract, exponential (4),
# running sum, cast; the accumulator's rescaling is spread over a block of keys.
SOFTMAX_INSTRUCTIONS = 9.0
CAP_INSTRUCTIONS = 10.0  # per score, of a soft cap: offset, divide, tanh (7), multiply


@cost_rule(attention_p)
def _attention_cost(q, k, v, *lengths, out, mesh, scale, causal, window) -> Work:
    """A FlashAttention kernel: scores stay on chip, blocks above the diagonal and those behind the
    window are skipped, and what no query sees is not read."""
    queries, keys = q.shape[-3], k.shape[-3]
    cache = k.nbytes + v.nbytes
    if window is None:
        scores = q.size / q.shape[-1] * keys
        if causal:  # key j is seen by query i if j <= i + keys - queries
            scores = scores * (1.0 - 0.5 * (queries / keys))
    else:  # the first queries of a prompt see fewer keys than the window holds
        seen = minimum(keys, Size.of(window))
        scores = q.size / q.shape[-1] * seen * (1.0 - 0.5 * (minimum(queries, seen) / keys))
        cache = cache * (minimum(keys, queries + (window - 1.0)) / keys)
    flops = scores * 2.0 * (q.shape[-1] + v.shape[-1])
    return Work(
        kind="attention",
        flops=flops,
        read_bytes=sum((x.nbytes for x in lengths), q.nbytes + cache),
        vector_bytes=scores * (4 * SOFTMAX_INSTRUCTIONS),
        **matmul_flops(q.dtype, flops),
    )


@cost_rule(latent_attention_p)
def _latent_attention_cost(
    q_latent, q_rope, latent, rope, *rest, out, mesh, scale, quantized
) -> Work:
    """All heads share one key and value per token, so the cache is read once for all of them."""
    keys = latent.shape[-2]
    scores = q_latent.size / q_latent.shape[-1] * keys
    flops = scores * 2.0 * (2.0 * q_latent.shape[-1] + q_rope.shape[-1])
    dequantize = latent.size * (2.0 * q_latent.itemsize) if quantized else 0.0
    return Work(
        kind="attention",
        flops=flops,
        vector_bytes=scores * (4 * SOFTMAX_INSTRUCTIONS) + dequantize,
        **matmul_flops(q_latent.dtype, flops),
    )
