"""Attention over blocks of keys in a chosen arithmetic: the arithmetic of FlashAttention and PASA.

Per block j of n keys, with scores S' = s - c_j that a shift has moved towards zero:

    m_j = max S',  P = exp(S' - m_j),  l_j = sum P,  O_j = P V_j,  c_j = gain * average_j
    F <- F (j-1)/j + average_j / j                                     running pseudo-average
    m <- max(m + gain (F_old - F), m_j + gain (average_j - F))         and l, O rescaled likewise
    result  O / l,   log-sum-exp  m + gain F + ln l

(Chen et al. 2025, arXiv 2503.01873, Algorithm 1; FlashAttention is the case gain = 0.) Any F gives
the same result in exact arithmetic: it only chooses the range of the numbers kept.

A cap on the scores is of the true ones, s = S' + c_j, which it bounds: from there on nothing is
shifted. A bias is added after it. Keys that no query sees take the mean of the others in their
block (`hidden`), so that the average is that of keys in use.

XLA's CPU backend widens half precision silently, so nothing here relies on a dtype: values are held
in float32 and rounded by `round_to` at every point where a half-precision kernel would store them.
A matrix product accumulates in float32 and is rounded once, as on the cube cores.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from cmjax.primitives.attention.hidden import keep, usable_keys
from cmjax.primitives.attention.pasa_shift import recovery_gain, shift_matrix


@dataclasses.dataclass(frozen=True)
class BlockArithmetic:
    """Which format each intermediate is stored in.

    Fields:
      operand: inputs of matrix products: Q, K, V, shifted keys, P.
      scores: S', as the first product leaves it.
      vector: S' - m, exp and P V_j, the work per score.
      statistics: averages, maxima, sums, the factors between blocks, and the accumulator O.
    """

    operand: DTypeLike
    scores: DTypeLike
    vector: DTypeLike
    statistics: DTypeLike

    @property
    def compute(self) -> DTypeLike:
        """What values are held in between roundings."""
        return jnp.promote_types(jnp.float32, self.statistics)


_FP16, _BF16, _FP32, _FP64 = jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64
_ARITHMETIC = {
    "fp16": BlockArithmetic(_FP16, _FP16, _FP16, _FP32),
    "bf16": BlockArithmetic(_BF16, _BF16, _BF16, _FP32),
    "fp16_fp32": BlockArithmetic(_FP16, _FP16, _FP32, _FP32),
    "fp16_operands": BlockArithmetic(_FP16, _FP32, _FP32, _FP32),
    "fp32": BlockArithmetic(_FP32, _FP32, _FP32, _FP32),
    "fp64": BlockArithmetic(_FP64, _FP64, _FP64, _FP64),
}
PRECISIONS = tuple(_ARITHMETIC)
STATISTICS = ("fp32", "storage", "exact_offset")


def arithmetic(precision: str, statistics: str) -> BlockArithmetic:
    """The formats of a precision; `storage` keeps the statistics in the format of the scores."""
    found = _ARITHMETIC[precision]
    return dataclasses.replace(found, statistics=found.vector) if statistics == "storage" else found


def round_to(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Round to `dtype` as storing would, overflow and subnormals included; the dtype of `x` stays.

    `lax.reduce_precision` cannot be optimised away, as a pair of conversions may be, but it flushes
    subnormals to zero. float16 has many that matter (softmax weights below 6e-5): those are rounded
    to the format's smallest step, 2^-24.
    """
    to, held = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if to.nmant >= held.nmant:
        return x
    rounded = lax.reduce_precision(x, to.nexp, to.nmant)
    if to.nexp == held.nexp:
        return rounded
    smallest, step = float(to.smallest_normal), float(to.smallest_subnormal)
    return jnp.where(jnp.abs(x) < smallest, jnp.round(x * (1 / step)) * step, rounded)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The keys, cut into blocks of `size`; the last block ends at the last key.

    Where the size does not divide the number of keys, the last block starts early and repeats keys
    of the one before it, which are hidden. So all blocks are equally long and hold real keys only,
    and one shift matrix and one gain serve all of them.
    """

    keys: Any  # int, or a symbolic dimension
    size: int

    @staticmethod
    def of(keys: Any, block_size: int) -> "Blocks":
        return Blocks(keys, min(block_size, keys) if isinstance(keys, int) else block_size)

    @property
    def count(self) -> Any:
        return (self.keys + self.size - 1) // self.size

    def _start(self, j) -> Any:
        return jnp.maximum(jnp.minimum(j * self.size, self.keys - self.size), 0)

    def take(self, x: Array, j, axis: int) -> Array:
        """Block `j` of `x` along `axis`."""
        if isinstance(self.keys, int):
            return lax.dynamic_slice_in_dim(x, self._start(j), self.size, axis)
        rows = jnp.minimum(self._start(j) + jnp.arange(self.size), self.keys - 1)
        return jnp.take(x, rows, axis)

    def visible(self, j, queries, mask: Array | None, causal: bool, window=None) -> Array | None:
        """Which keys of block `j` a query sees, broadcastable to scores [..., k, g, t, i]."""
        key = self._start(j) + jnp.arange(self.size)
        seen = None
        if not (isinstance(self.keys, int) and self.keys % self.size == 0):
            seen = (key >= j * self.size) & (key < self.keys)
        if causal:
            earlier = _behind(key, queries, window)
            seen = earlier if seen is None else seen & earlier
        if mask is not None:
            given = of_block(self, mask, j)
            seen = given if seen is None else seen & given
        return seen

    def fold(self, block: Callable, merge: Callable) -> Any:
        """`merge` the results of `block(0)`, `block(1)`, ... in order.

        The first one is the initial state: it varies over mesh axes as the operands do.
        """
        state = block(jnp.int32(0))
        if isinstance(self.count, int) and self.count == 1:
            return state
        later = 1 + jnp.arange(self.count - 1, dtype=jnp.int32)
        return lax.scan(lambda state, j: (merge(state, block(j), j), None), state, later)[0]


class _State(NamedTuple):
    """Attention over the keys seen so far: exp(top + gain * average) * (mass, sum) is the truth."""

    average: Array  # of scores, the running reference
    top: Array  # largest score, relative to the reference
    mass: Array  # sum of exp(score - top)
    sum: Array  # the same, weighted with values


def blockwise_attention(
    q,
    k,
    v,
    *more,
    precision,
    statistics,
    shift,
    beta,
    block_size,
    scale,
    causal,
    window=None,
    softcap=None,
    has_bias=False,
) -> list[Array]:
    """Attention and its log-sum-exp. See `pasa.pasa_attention` for the meaning of all parameters.

    q [..., t, heads, d], k [..., s, kv_heads, d], v [..., s, kv_heads, dv]; then mask and bias as
    far as they are there, broadcastable to [..., heads, t, s]; `shift` is "gemm", "mean" or, for
    plain FlashAttention, "none".
    """
    form = arithmetic(precision, statistics)
    kv_heads = k.shape[-2]
    blocks = Blocks.of(k.shape[-3], block_size)
    out_dtype = q.dtype
    q, k, v = (round_to(x.astype(form.compute), form.operand) for x in (q, k, v))
    seen, bias = mask_and_bias(more, has_bias, kv_heads)
    k, v, usable = _in_use(k, v, seen, q.shape[-3], causal, window)
    q = group_heads(q, kv_heads)
    shifted, gain = _shift(form, shift, statistics, beta, blocks.size, scale)

    def vector(x):
        return round_to(x, form.vector)

    def row(x):
        return round_to(x, form.statistics)

    def block(j) -> _State:
        keys, values = blocks.take(k, j, -3), blocks.take(v, j, -3)
        if usable is not None and shift != "none":
            keys = round_to(_with_mean(keys, blocks.take(usable.kept, j, -2)), form.operand)
        keys, removed = shifted(keys)
        scores = round_to(product("...kgtd,...ikd->...kgti", q, keys), form.scores)
        if removed is not None:
            average = product("...kgtd,...kd->...kgt", q, removed)
        elif shift == "none":
            scores = vector(vector(scores) * scale)
            average = jnp.zeros_like(scores[..., 0])
        else:
            average = row(jnp.mean(scores, axis=-1))  # before any mask: the shift saw all keys
        if softcap is not None:
            # The true scores, large again: in the format of the statistics until their maximum is
            # subtracted.
            scores = row(softcap * jnp.tanh((scores + gain * average[..., None]) / softcap))
            average = jnp.zeros_like(average)
        if bias is not None:
            held = vector if softcap is None else row
            scores = held(scores + of_block(blocks, bias, j).astype(scores.dtype))
        visible = blocks.visible(j, q.shape[-2], seen, causal, window)
        if visible is None:
            top = jnp.max(scores, axis=-1)
            weights = vector(jnp.exp(vector(scores - top[..., None])))
        else:
            top = jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1)
            # By the mask, not by the value: scores that overflowed to -inf must become NaN.
            base = jnp.where(jnp.any(visible, axis=-1), top, 0)
            weights = jnp.where(visible, vector(jnp.exp(vector(scores - base[..., None]))), 0)
        mass = row(jnp.sum(weights, axis=-1))
        if usable is not None:
            assert visible is not None  # a key is used or not only where some are hidden
            broken = jnp.swapaxes(blocks.take(usable.broken, j, -2), -1, -2)
            lost = jnp.any(visible & broken[..., None, None, :], axis=-1)
            mass = jnp.where(lost, jnp.nan, mass)
        weights = round_to(weights, form.operand)
        return _State(
            average, top, mass, row(vector(product("...kgti,...ikd->...kgtd", weights, values)))
        )

    def merge(old: _State, new: _State, j) -> _State:
        average = row(row(old.average * (j / (j + 1))) + row(new.average / (j + 1)))
        old_top = row(old.top + row(gain * row(old.average - average)))
        new_top = row(new.top + row(gain * row(new.average - average)))
        top = jnp.maximum(old_top, new_top)
        base = jnp.where(jnp.isneginf(top), 0, top)  # nothing seen yet
        keep, add = (row(jnp.exp(row(t - base))) for t in (old_top, new_top))
        mass = row(row(keep * old.mass) + row(add * new.mass))
        kept, added = row(keep[..., None] * old.sum), row(add[..., None] * new.sum)
        return _State(average, top, mass, row(kept + added))

    state = blocks.fold(block, merge)
    mass = state.mass[..., None]
    out = vector(state.sum / jnp.where(mass == 0, 1, mass))
    lse = state.top + gain * state.average + jnp.log(state.mass)
    return [ungroup_heads(out).astype(out_dtype), ungroup_heads(lse[..., None])[..., 0]]


def mask_and_bias(more, has_bias: bool, kv_heads: int) -> tuple[Any, Any]:
    """What is seen and what is added to the scores, by key head; a bias of -inf hides."""
    seen = group_mask(more[0], kv_heads) if len(more) > has_bias else None
    if not has_bias:
        return seen, None
    bias = group_mask(more[-1], kv_heads)
    shown = ~jnp.isneginf(bias)
    return shown if seen is None else seen & shown, jnp.where(shown, bias, 0)


def used_by_any(seen, queries, keys, causal, window) -> Array | None:
    """Keys that some query of a key head sees, [..., keys, kv_heads or 1]; `None` for all."""
    if seen is None and not causal:
        return None
    if seen is None:
        return jnp.any(_behind(jnp.arange(keys), queries, window), axis=0)[:, None]
    both = seen & _behind(jnp.arange(keys), queries, window) if causal else seen
    used = jnp.any(both, axis=(-3, -2))
    used = jnp.broadcast_to(used, (*used.shape[:-1], keys))
    return jnp.swapaxes(used, -1, -2)


def _in_use(k, v, seen, queries, causal, window):
    """Keys and values with zeros for those that do not count, and which do; `None` for all."""
    used = used_by_any(seen, queries, k.shape[-3], causal, window)
    if used is None:
        return k, v, None
    usable = usable_keys(used, k, v)
    return keep(k, usable.kept), keep(v, usable.kept), usable


def _with_mean(keys, kept):
    """Keys [..., i, kv_heads, d], the mean of those kept, [..., i, kv_heads], for the others."""
    count = jnp.sum(kept, axis=-2, keepdims=True, dtype=keys.dtype)
    mean = jnp.sum(keys, axis=-3, keepdims=True) / jnp.maximum(count, 1)[..., None]
    return jnp.where(kept[..., None], keys, mean)


def _behind(key, queries, window):
    """Keys up to a query's own, and with a window only the newest of them."""
    at = jnp.arange(queries)[:, None]
    return key <= at if window is None else (key <= at) & (key > at - window)


def of_block(blocks: Blocks, x: Array, j) -> Array:
    """What a mask or bias [..., keys or 1] has for block `j`."""
    return x if x.shape[-1] == 1 else blocks.take(x, j, -1)


def _shift(
    form: BlockArithmetic, shift, statistics, beta, size: int, scale
) -> tuple[Callable, float]:
    """How a block of keys is shifted, and the gain that recovers what was removed.

    The shifting function returns the keys and, for the exact offset, the vector whose product with
    a query is what the shift took from its scores.
    """
    if shift == "none":
        return lambda keys: (keys, None), 0.0
    if shift == "gemm":
        matrix = jnp.asarray(shift_matrix(size, beta, scale, form.operand), form.compute)
        gain = recovery_gain(size, beta, scale, form.operand)
        return lambda keys: (
            round_to(product("ij,...jkd->...ikd", matrix, keys), form.operand),
            None,
        ), _stored(gain, form.statistics)

    def subtract_mean(keys):
        mean = jnp.mean(keys, axis=-3, keepdims=True)
        moved = round_to(scale * (keys - beta * mean), form.operand)
        return moved, (scale * beta) * mean[..., 0, :, :] if statistics == "exact_offset" else None

    if statistics == "exact_offset":
        return subtract_mean, 1.0
    return subtract_mean, _stored(beta / (1 - beta), form.statistics)


def _stored(value: float, dtype: DTypeLike) -> float:
    return float(np.asarray(value).astype(jnp.dtype(dtype)))


def product(subscripts: str, a: Array, b: Array) -> Array:
    """A matrix product that accumulates in the operands' own (wide) format on every platform."""
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)


def group_heads(x: Array, kv_heads: int) -> Array:
    """[..., t, heads, d] -> [..., kv_heads, heads // kv_heads, t, d]."""
    *lead, queries, heads, d = x.shape
    return jnp.moveaxis(x.reshape(*lead, queries, kv_heads, heads // kv_heads, d), -4, -2)


def ungroup_heads(x: Array) -> Array:
    """The inverse of `group_heads`."""
    *lead, kv_heads, group, queries, d = x.shape
    return jnp.moveaxis(x, -2, -4).reshape(*lead, queries, kv_heads * group, d)


def group_mask(mask: Array, kv_heads: int) -> Array:
    """[..., heads or 1, t, s] -> [..., kv_heads or 1, group or 1, t, s]."""
    *lead, heads, queries, keys = mask.shape
    if heads == 1:
        return mask[..., None, :, :]
    return mask.reshape(*lead, kv_heads, heads // kv_heads, queries, keys)
