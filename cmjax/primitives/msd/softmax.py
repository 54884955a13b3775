"""The softmax between the two products of `msd_attention`, and which keys take part in it.

    s <- cap tanh(s / cap) + bias,    p = exp(s - m),    l = sum p + exp(sink - m)

Scores are [..., kv_heads, group, q_len, kv_len]. What else a call has comes as operands with their
names: lengths [...], mask and bias [..., heads or 1, q_len or 1, kv_len], sinks [..., heads].
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cmjax.primitives.attention.exact import visible_keys
from cmjax.primitives.attention.hidden import Usable
from cmjax.primitives.msd.weight import WeightFormat

_MASKED = -1e30  # finite, so that a fully masked row stays free of NaN


def visible_scores(q_len, kv_len, kv_heads, causal, window, extras: dict[str, Array]):
    """Which scores count, broadcastable to them; `None` for all."""
    visible = visible_keys(q_len, kv_len, extras.get("lengths"), causal, window)
    if visible is not None:
        visible = visible[..., None, None, :, :]
    for name in ("mask", "bias"):
        if name in extras:
            given = _by_kv_head(extras[name], kv_heads)
            given = given if name == "mask" else ~jnp.isneginf(given)
            visible = given if visible is None else given & visible
    return visible


def softmax(scores, visible, softcap, extras: dict[str, Array]):
    """exp(S - max S), zero where not visible, and its sum (1 for a row that sees nothing)."""
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if "bias" in extras:
        scores = scores + _by_kv_head(extras["bias"], scores.shape[-4]).astype(scores.dtype)
    if visible is not None:
        scores = jnp.where(visible, scores, _MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    sinks = extras.get("sinks")
    if sinks is not None:
        sinks = sinks.astype(scores.dtype).reshape(*sinks.shape[:-1], *scores.shape[-4:-2], 1, 1)
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    if visible is not None:
        weights = jnp.where(visible, weights, 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    return weights, jnp.where(total == 0, 1, total)


def in_use(q, k, k_scale, v_scale, causal, window, more, format):
    """Which scores count, which entries of the cache are in use, and both scales, 0 elsewhere."""
    kv_len, kv_heads = k.shape[-3:-1]
    visible = visible_scores(q.shape[-3], kv_len, kv_heads, causal, window, more)
    usable = _used_entries(visible, k_scale, v_scale, kv_len, format)
    if usable is not None:
        k_scale, v_scale = (_scales_in_use(s, usable.kept) for s in (k_scale, v_scale))
    return visible, usable, (k_scale, v_scale)


def _used_entries(visible, k_scale, v_scale, kv_len, format: WeightFormat) -> Usable | None:
    """Entries of the cache that some query sees, and whether their scales are numbers.

    Returns: [..., kv_len, kv_heads], or `None` where every query sees every entry.
    """
    if visible is None:
        return None
    seen = jnp.swapaxes(jnp.any(visible, axis=(-3, -2)), -1, -2)  # [..., kv_len, kv_heads or 1]
    seen = jnp.broadcast_to(seen, (*seen.shape[:-2], kv_len, seen.shape[-1]))
    good = jnp.asarray(True)
    for scale in (k_scale, v_scale):
        number = scale != 255 if format == "mxfp4" else jnp.isfinite(scale)
        number = jnp.all(number, axis=-1)
        if number.shape[-2] not in (1, kv_len):  # blocks of tokens
            number = jnp.repeat(number, kv_len // number.shape[-2], axis=-2)
        good = good & number
    return Usable(seen & good, seen & ~good)


def _scales_in_use(scale, kept):
    """Zeros for the scales of entries that are not kept, where a scale belongs to entries."""
    entries = scale.shape[-3]
    if entries == 1 and kept.shape[-2] != 1:
        return scale  # per channel
    size = kept.shape[-2] // entries if entries else 1
    blocks = kept.reshape(*kept.shape[:-2], entries, size, kept.shape[-1])
    return jnp.where(jnp.any(blocks, axis=-2)[..., None], scale, jnp.zeros((), scale.dtype))


def _by_kv_head(x, kv_heads):
    """[..., heads or 1, q, k] to [..., kv_heads or 1, group or 1, q, k]."""
    heads = x.shape[-3]
    split = (kv_heads, heads // kv_heads) if heads > 1 else (1, 1)
    return x.reshape(*x.shape[:-3], *split, *x.shape[-2:])
