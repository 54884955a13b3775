"""Attention over an INT8 or MXFP4 cache that is never dequantized.

    S = scale * (M_q / 127) (q1 k^T + q2 k^T / 254) * k_scale
    O = sum over key blocks b of (M_b / 127) (p1 v_b + p2 v_b / 254) / l

Both matrix products of attention are multi-scale products (`msd_decompose`; Zheng et al., arXiv
2605.13915): queries are split by rows, and so are the softmax weights p = exp(S - max S). A scale
per channel of k is folded into q before it is split, one per token of v into p. l is the sum of the
unrounded p in float32.

The vendor's kernels split p with the fixed scale 127, which is right where the weights are near 1
but flushes whatever is 11.07 nats under the maximum to zero: with an attention sink, all other keys
at once. Here every block of keys is split against its own maximum M_b.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int, Int8, UInt8

from cmjax.primitives.attention.exact import CAP_INSTRUCTIONS, SOFTMAX_INSTRUCTIONS
from cmjax.primitives.attention.hidden import keep
from cmjax.primitives.define import count_where, define, straight_through
from cmjax.primitives.msd import mxfp4
from cmjax.primitives.msd.decompose import (
    check_activations,
    check_finite,
    check_passes,
    decompose_instructions,
    round_mxfp4,
    split_int8,
)
from cmjax.primitives.msd.kv import keys_of, values_of
from cmjax.primitives.msd.mxfp4 import Rounding
from cmjax.primitives.msd.product import MOST_INNER, recombine_instructions, recombined
from cmjax.primitives.msd.softmax import in_use, softmax, visible_scores
from cmjax.primitives.msd.weight import WeightFormat
from cmjax.program import Size, Work, cost_rule
from cmjax.program.size import minimum


def msd_attention(
    q: Float[Array, "batch q_len heads d"],
    k: Int8[Array, "batch kv_len kv_heads d"] | UInt8[Array, "batch kv_len kv_heads d//2"],
    v: Int8[Array, "batch kv_len kv_heads dv"] | UInt8[Array, "batch kv_len kv_heads dv_bytes"],
    *,
    k_scale: Float32[Array, "#batch #kv_len kv_heads #d"] | UInt8[Array, "..."],
    v_scale: Float32[Array, "#batch #kv_len kv_heads #dv"] | UInt8[Array, "..."],
    scale: float,
    causal: bool,
    lengths: Int[Array, "batch"] | None = None,
    window: int | None = None,
    mask: Bool[Array, "#batch #heads #q_len kv_len"] | None = None,
    bias: Float[Array, "#batch #heads #q_len kv_len"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    format: WeightFormat = "int8",
    passes: int = 2,
    p_scale: Literal["block", "fixed"] = "block",
    block_size: int = 128,
    rounding: Rounding = "away",
) -> Float[Array, "batch q_len heads dv"]:
    """Scaled dot-product attention of floating-point queries over few-bit keys and values.

    Args:
      q: queries, float32, bfloat16 or float16; `heads` is a multiple of `kv_heads`.
      k, v, k_scale, v_scale, format: a cache as in `QuantizedKV`; int8 scales are per token
        (last axis 1) or per channel (second axis 1).
      scale: factor on the scores, usually `d ** -0.5`.
      causal, lengths, window: as in `attention`.
      mask: True where a query may see a key, in addition.
      bias: added to the scores, after `scale` and `softcap`; -inf hides.
      softcap: c > 0 turns scores s into c tanh(s / c) (Gemma 2).
      sinks: per head, a score that takes part in the softmax and has no value (GPT-OSS).
      passes: parts of the queries and of the softmax weights.
      p_scale: int8 only: "block" splits the weights of every `block_size` keys against their own
        maximum. "fixed" is the vendor's scale 127 of the row's maximum: weights under 1.55e-5 of it
        vanish, and results can be wrong by more than their size where many keys are that small.
      block_size: keys per block.
      rounding: see `msd_decompose`.
    Returns: dtype of `q`. A query that sees nothing gets zeros.
    Gradient: straight-through, that of exact attention over the dequantized cache, for q and int8
      scales.
    Entries that no query sees may hold anything, scales included. Under `jit`, a query with an
    infinity or NaN gives NaN, and so does one that sees an entry whose scale is none.
    Raises: ValueError, TypeError: shapes and dtypes that do not fit; and where values are known, an
      infinity or NaN in q, or a scale in use that is not positive and finite.
    Source: Zheng et al., arXiv:2605.13915, and the formulas of this module.
    Example: attention over an int8 cache of identical keys averages the values.

      >>> from cmjax.primitives.msd.kv import quantize_kv
      >>> cache = quantize_kv(jnp.ones((1, 2, 1, 4)), jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1))
      >>> scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
      >>> q = jnp.ones((1, 1, 2, 4))
      >>> y = msd_attention(q, cache.k, cache.v, **scales, scale=0.5, causal=False)
      >>> y.shape, round(float(y[0, 0, 0, 0]), 3)
      ((1, 1, 2, 1), 2.0)
    """
    check_activations("msd_attention", q)
    check_passes("msd_attention", passes, format, rounding)
    check_finite("msd_attention", "q", q)
    _check_options(causal, window, softcap, sinks, q)
    extras = {"lengths": lengths, "mask": mask, "bias": bias, "sinks": sinks}
    extras = {name: jnp.asarray(x) for name, x in extras.items() if x is not None}
    if format == "int8":
        k_scale, v_scale = (
            jnp.broadcast_to(s, (k.shape[0], *s.shape[1:])) if s.ndim == 4 else s
            for s in (k_scale, v_scale)
        )
    operands = [jnp.asarray(a) for a in (q, k, v, k_scale, v_scale)]
    for name, x in extras.items():
        if name == "lengths":
            x = x.astype(jnp.int32)
        elif name == "sinks":
            x = jnp.broadcast_to(x, (q.shape[0], *x.shape))
        elif x.ndim == q.ndim:
            x = jnp.broadcast_to(x, (q.shape[0], *x.shape[1:]))
        operands.append(x)
    params = {
        "scale": float(scale),
        "causal": bool(causal),
        "window": window,
        "softcap": None if softcap is None else float(softcap),
        "extras": tuple(extras),
        "format": format,
        "passes": passes,
        "p_scale": p_scale,
        "block_size": block_size,
        "rounding": rounding,
    }
    _check(*map(jax.typeof, operands), **params)
    _check_values(q, k, k_scale, v_scale, format, causal, window, extras)
    return msd_attention_p.bind(*operands, **params)


def _reference(
    q,
    k,
    v,
    k_scale,
    v_scale,
    *rest,
    scale,
    causal,
    window,
    softcap,
    extras,
    format,
    passes,
    p_scale,
    block_size,
    rounding,
):
    more = dict(zip(extras, rest, strict=True))
    visible, usable, (k_scale, v_scale) = in_use(
        q, k, k_scale, v_scale, causal, window, more, format
    )
    grouped, kv_len = _grouped(q, k.shape[-2]), k.shape[-3]
    if format == "int8":
        scores = _int8_scores(grouped, k, k_scale, passes, rounding)
    else:
        split = round_mxfp4(grouped, passes, rounding)
        scores = _sums("...qhgd,...khd->...hgqk", split, keys_of(k, k_scale, format))
    weights, total = softmax(scale * scores, visible, softcap, more)
    if format == "int8":
        size = kv_len if p_scale == "fixed" else block_size
        out = _int8_output(weights, v, v_scale, passes, size, rounding)
    else:
        split = round_mxfp4(weights, passes, rounding)
        values = values_of(v, v_scale, format)
        if usable is not None:
            values = keep(values, usable.kept)
        out = _sums("...hgqk,...khd->...hgqd", split, values)
    return _heads_last(_nan_where_lost(out / total, visible, usable), q)


def _grouped(q, kv_heads):
    """[..., q_len, kv_heads, group, d]"""
    *lead, heads, d = q.shape
    return q.astype(jnp.float32).reshape(*lead, kv_heads, heads // kv_heads, d)


def _nan_where_lost(out, visible, usable):
    """NaN for queries that see an entry without a scale."""
    if usable is None:
        return out
    broken = jnp.swapaxes(usable.broken, -1, -2)[..., None, None, :]
    return jnp.where(jnp.any(visible & broken, axis=-1)[..., None], jnp.nan, out)


def _int8_scores(q, k, k_scale, passes, rounding):
    """[..., kv_heads, group, q_len, kv_len]; `q` is [..., q_len, kv_heads, group, d]."""
    per_token = _is_per_token(k_scale)
    if not per_token:
        q = q * k_scale[..., :, :, None, :]
    parts, top = split_int8(q, passes, rounding)
    sums = [
        jnp.einsum("...qhgd,...khd->...hgqk", part, k, preferred_element_type=jnp.int32)
        for part in parts
    ]
    total, unit = recombined(sums)
    scores = total * jnp.moveaxis(top * unit, -3, -1)[..., None]
    return scores * _by_key(k_scale[..., 0]) if per_token else scores


def _int8_output(weights, v, v_scale, passes, block_size, rounding):
    """[..., kv_heads, group, q_len, dv], not yet divided by the sum of the weights."""
    per_token = _is_per_token(v_scale)
    if per_token:
        weights = weights * _by_key(v_scale[..., 0])
    keys = weights.shape[-1]
    count = (keys + block_size - 1) // block_size
    missing = count * block_size - keys
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, missing)])
    v = jnp.pad(v, [(0, 0)] * (v.ndim - 3) + [(0, missing), (0, 0), (0, 0)])
    blocks = weights.reshape(*weights.shape[:-1], count, block_size)
    v = v.reshape(*v.shape[:-3], count, block_size, *v.shape[-2:])
    parts, top = split_int8(blocks, passes, rounding)
    sums = [
        jnp.einsum("...hgqbk,...bkhd->...hgqbd", part, v, preferred_element_type=jnp.int32)
        for part in parts
    ]
    total, unit = recombined(sums)
    out = jnp.sum(total * (top * unit)[..., None], axis=-2)
    if not per_token:
        out = out * jnp.swapaxes(v_scale, -3, -2)[..., None, :, :]
    return out


def _sums(equation, a, b):
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


def _heads_last(out, q):
    """[..., kv_heads, group, q_len, dv] to the layout and dtype of q."""
    out = jnp.moveaxis(out, -2, -4)
    return out.reshape(*q.shape[:-1], out.shape[-1]).astype(q.dtype)


def _is_per_token(scale):
    return scale.shape[-1] == 1


def _by_key(scale):
    """[..., kv_len, kv_heads] beside [..., kv_heads, group, q_len, kv_len]."""
    return jnp.swapaxes(scale, -2, -1)[..., :, None, None, :]


def _exact(q, k, v, k_scale, v_scale, *rest, scale, causal, window, softcap, extras, format):
    """Attention over the dequantized cache, whose derivative stands for the rounded one's."""
    more = dict(zip(extras, rest, strict=True))
    visible, _, (k_scale, v_scale) = in_use(q, k, k_scale, v_scale, causal, window, more, format)
    grouped = _grouped(q, k.shape[-2])
    scores = _sums("...qhgd,...khd->...hgqk", grouped, keys_of(k, k_scale, format))
    weights, total = softmax(scale * scores, visible, softcap, more)
    out = _sums("...hgqk,...khd->...hgqd", weights / total, values_of(v, v_scale, format))
    return _heads_last(out, q)


def _jvp(p, primals, tangents, **params):
    names = ("scale", "causal", "window", "softcap", "extras", "format")
    kept = {name: params[name] for name in names}
    return straight_through(lambda *a: _exact(*a, **kept), p, primals, tangents, params)


def _check(q, k, v, k_scale, v_scale, *rest, extras, format, p_scale, block_size, **_):
    for name, x in (("q", q), ("k", k), ("v", v), ("k_scale", k_scale), ("v_scale", v_scale)):
        if x.ndim < 4:
            raise ValueError(
                f"msd_attention: {name} must be [batch, length, heads, d], got {list(x.shape)}"
            )
    wanted, codes = (jnp.int8, 1) if format == "int8" else (jnp.uint8, 2)
    if k.dtype != wanted or v.dtype != wanted:
        raise TypeError(
            f"msd_attention: k and v must be {jnp.dtype(wanted)} for {format}, got {k.dtype} and "
            f"{v.dtype}"
        )
    *lead, kv_len, kv_heads, d = *k.shape[:-1], codes * k.shape[-1]
    if q.shape[-1] != d or (*q.shape[:-3], *k.shape[-3:-1]) != v.shape[:-1]:
        raise ValueError(
            "msd_attention: q and k must agree in batch and d, and k and v in all but d, got q "
            f"{list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[-2] % kv_heads:
        raise ValueError(
            f"msd_attention: heads must be a multiple of kv_heads, got {q.shape[-2]} query heads "
            f"and {kv_heads} key heads"
        )
    dv = codes * v.shape[-1]
    if format == "int8":
        for name, s, width in (("k_scale", k_scale, d), ("v_scale", v_scale, dv)):
            forms = (*lead, kv_len, kv_heads, 1), (*lead, 1, kv_heads, width)
            if tuple(s.shape) not in forms or s.dtype != jnp.float32:
                raise ValueError(
                    f"msd_attention: {name} must be float32 {list(forms[0])} (per token) or "
                    f"{list(forms[1])} (per channel), got {s.dtype}{list(s.shape)}"
                )
    else:
        if d % mxfp4.BLOCK or kv_len % mxfp4.BLOCK:
            raise ValueError(
                "msd_attention: mxfp4 needs d and kv_len to be multiples of 32, got "
                f"{d} and {kv_len}"
            )
        forms = (*lead, kv_len, kv_heads, d // 32), (*lead, kv_len // 32, kv_heads, dv)
        for name, s, form in zip(("k_scale", "v_scale"), (k_scale, v_scale), forms, strict=True):
            if tuple(s.shape) != form or s.dtype != jnp.uint8:
                raise ValueError(
                    f"msd_attention: {name} must be uint8 {list(form)} for mxfp4, got "
                    f"{s.dtype}{list(s.shape)}"
                )
    _check_blocks(format, p_scale, block_size, d, kv_len)
    for name, x in zip(extras, rest, strict=True):
        if name in ("mask", "bias"):
            _check_scores(name, x, q, kv_len)


def _check_blocks(format, p_scale, block_size, d, kv_len):
    if p_scale not in ("block", "fixed"):
        raise ValueError(f'msd_attention: p_scale must be "block" or "fixed", got {p_scale!r}')
    if p_scale == "fixed" and format != "int8":
        raise ValueError('msd_attention: p_scale="fixed" exists for int8 only')
    if block_size < 1:
        raise ValueError(f"msd_attention: block_size must be at least 1 key, got {block_size}")
    longest: Any = kv_len if p_scale == "fixed" else block_size
    if format == "int8" and isinstance(longest, int) and max(longest, d) > MOST_INNER:
        raise ValueError(
            f"msd_attention: {max(longest, d)} products of int8 could overflow an int32 sum; at "
            f'most {MOST_INNER}: use p_scale="block" and a smaller block_size'
        )


def _check_scores(name, x, q, kv_len):
    kind = jnp.bool_ if name == "mask" else jnp.floating
    allowed = x.ndim == q.ndim and jnp.issubdtype(x.dtype, kind) and x.shape[-1] == kv_len
    if not (
        allowed
        and x.shape[-3] in (1, q.shape[-2])
        and x.shape[-2] in (1, q.shape[-3])
        and x.shape[:-3] == q.shape[:-3]
    ):
        raise ValueError(
            f"msd_attention: {name} must be {'bool' if name == 'mask' else 'floating point'} "
            f"[batch or 1, heads or 1, q_len or 1, kv_len], got {x.dtype}{list(x.shape)}"
        )


def _check_options(causal, window, softcap, sinks, q):
    if window is not None and (not isinstance(window, int) or window < 1 or not causal):
        raise ValueError(
            "msd_attention: window must be an integer of at least 1 key and needs causal=True, got "
            f"window={window!r} and causal={causal}"
        )
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"msd_attention: softcap must be positive and finite, got {softcap}")
    if sinks is not None and jnp.shape(sinks) != q.shape[-2:-1]:
        raise ValueError(
            f"msd_attention: sinks must be [{q.shape[-2]}], one per query head, got "
            f"{list(jnp.shape(sinks))}"
        )


def _check_values(q, k, k_scale, v_scale, format, causal, window, extras):
    """Refuse scales that are known, in use (which must be known too), and no positive numbers."""
    used = None
    if q.ndim == k.ndim == 4 and not any(isinstance(x, Tracer) for x in extras.values()):
        with jax.ensure_compile_time_eval():
            sizes = (q.shape[-3], k.shape[-3], k.shape[-2])
            if all(isinstance(n, int) for n in sizes):
                visible = visible_scores(*sizes, causal, window, extras)
                used = visible if visible is None else jnp.any(visible, axis=(-3, -2))
    elif extras:
        return
    for name, s in (("k_scale", k_scale), ("v_scale", v_scale)):

        def bad(e):
            wrong = e == 255 if format == "mxfp4" else ~(jnp.isfinite(e) & (e > 0))
            if used is None or (e.shape[-3] == 1 and k.shape[-3] != 1):
                return wrong
            entries = jnp.swapaxes(used, -1, -2)  # [..., kv_len, kv_heads or 1]
            size = entries.shape[-2] // max(e.shape[-3], 1)
            blocks = entries.reshape(*entries.shape[:-2], e.shape[-3], size, entries.shape[-1])
            return wrong & jnp.any(blocks, axis=-2)[..., None]

        if count := count_where(bad, s):
            raise ValueError(
                f"msd_attention: every {name} must be positive and finite where it is in use, "
                f"{count} of {jnp.size(s)} are not"
            )


msd_attention_p = define("cm_msd_attention", _reference, check=_check, jvp=_jvp)


@cost_rule(msd_attention_p)
def _cost(
    q,
    k,
    v,
    k_scale,
    v_scale,
    *rest,
    out,
    mesh,
    causal,
    window,
    softcap,
    extras,
    format,
    passes,
    p_scale,
    block_size,
    **_,
) -> Work:
    """A FlashAttention kernel over the few-bit cache, which is read once: scores, weights and their
    parts stay on chip, and blocks above the diagonal and behind the window are skipped."""
    queries, keys = q.shape[-3], k.shape[-3]
    d, dv = q.shape[-1], out[0].shape[-1]
    rows = q.size / d
    scores = rows * keys
    if window is not None:  # the first queries of a prompt see fewer keys than the window holds
        seen = minimum(keys, Size.of(window))
        scores = rows * seen * (1.0 - 0.5 * (minimum(queries, seen) / keys))
    elif causal:  # key j is seen by query i if j <= i + keys - queries
        scores = scores * (1.0 - 0.5 * (queries / keys))
    products = scores * (2.0 * passes) * (d + dv)
    split = q.size + scores
    blocks = 1.0 if p_scale == "fixed" else scores / rows / block_size
    further = (0.0 if softcap is None else CAP_INSTRUCTIONS) + ("bias" in extras)
    vector = (
        scores * (SOFTMAX_INSTRUCTIONS + further)
        + split * decompose_instructions(passes)
        + (scores + rows * dv * blocks) * recombine_instructions(passes)
    )
    return Work(
        kind="attention",
        flops=products,
        cube_flops_8bit=products * (0.5 if format == "mxfp4" else 1.0),
        vector_bytes=vector * 4.0,
    )
