"""Will attention overflow in half precision on these Q, K, V, and what does each arithmetic cost?

Every variant runs on the same operands and is compared with softmax attention in float64 NumPy:

    relative RMSE = rms(out - exact) / rms(exact)

on the operands as rounded to the variant's format, so that it is the error of the arithmetic alone;
what the rounding of Q, K, V itself does is reported beside it. Metrics as in Chen et al. 2025
(arXiv 2503.01873): range and overflowing share of Q K^T, and the error.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, DTypeLike, Float

from cmjax.primitives.attention.blockwise import arithmetic
from cmjax.primitives.attention.pasa import flash_attention, pasa_attention
from cmjax.primitives.attention.pasa_shift import pasa_beta, shift_matrix

FP16_OVERFLOW = 65520.0
"""The smallest magnitude that rounds to infinity in float16."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """An attention function and the arithmetic to run it in."""

    attention: Callable
    precision: str
    statistics: str = "fp32"


VARIANTS: Mapping[str, Variant] = {
    "FA fp32": Variant(flash_attention, "fp16_operands"),
    "FA fp16-fp32": Variant(flash_attention, "fp16_fp32"),
    "FA fp16": Variant(flash_attention, "fp16", "storage"),
    "PASA fp16 published": Variant(pasa_attention, "fp16", "storage"),
    "PASA fp16-fp32": Variant(pasa_attention, "fp16_fp32"),
    "PASA fp16": Variant(pasa_attention, "fp16"),
    "PASA exact offset": Variant(pasa_attention, "fp16", "exact_offset"),
}
"""What `attention_numerics` compares by default, all on float16 operands; FA: FlashAttention."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Where a set of scores lies, and how much of it float16 cannot hold."""

    smallest: float
    largest: float
    overflowing: float
    """Share of the visible scores of magnitude 65520 or more."""
    overflowing_rows: float
    """Share of (batch, head, query) rows with at least one of them."""


@dataclasses.dataclass(frozen=True)
class Error:
    """How far one variant is from exact attention."""

    rmse: float
    """Root mean square error; NaN if any output is not finite."""
    relative_rmse: float
    """The same over the root mean square of the exact output."""
    bad_rows: float
    """Share of (batch, head, query) rows with an output that is not finite."""


@dataclasses.dataclass(frozen=True)
class AttentionNumerics:
    """What `attention_numerics` finds."""

    scores: Range
    """q k^T, unscaled, as FlashAttention stores it."""
    shifted: Range
    """S' of PASA with the float16 shift matrix, as it is stored."""
    input_rounding: Error
    """Exact attention of the operands rounded to float16 against exact attention as given."""
    errors: Mapping[str, Error]
    """By name of the variant."""


def attention_numerics(
    q: Float[ArrayLike, "*batch q_len heads d"],
    k: Float[ArrayLike, "*batch kv_len kv_heads d"],
    v: Float[ArrayLike, "*batch kv_len kv_heads dv"],
    *,
    beta: float | None = None,
    block_size: int = 128,
    mask: Bool[ArrayLike, "*#batch #heads #q_len #kv_len"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    variants: Mapping[str, Variant] = VARIANTS,
) -> AttentionNumerics:
    """Ranges of the scores and errors of half-precision attention on given operands.

    Runs in NumPy one head at a time, so memory is a few [q_len, kv_len] float64 matrices.

    Args:
      q, k, v, mask, causal, scale, block_size: as in `pasa_attention`.
      beta: of the recovering variants and of `shifted`; default as in `pasa_attention`. The exact
        offset keeps its own default.
      variants: what to compare, by name.
    Raises: TypeError, ValueError: as `pasa_attention`; ValueError for values that are not finite,
      or that float16 cannot hold in the first place.
    Returns: ranges of q k^T and of the shifted scores, and the error of each variant against
      softmax attention in float64; printed, a table.
    Source: the comparison of PASA with FlashAttention (arXiv:2503.01873).
    Example: keys with a common offset overflow float16 unless it is removed.

      >>> q = np.full((1, 4, 1, 128), 30, np.float32)
      >>> found = attention_numerics(q, q, np.ones_like(q))
      >>> bool(found.scores.overflowing > 0), bool(found.shifted.overflowing > 0)
      (True, False)
    """
    q, k, v = (np.asarray(x) for x in (q, k, v))
    options: dict[str, Any] = {"block_size": block_size, "causal": causal, "scale": scale}
    if mask is not None:
        options["mask"] = np.asarray(mask)
    jax.eval_shape(functools.partial(pasa_attention, beta=beta, **options), q, k, v)  # checks
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.size:
            raise ValueError(f"attention_numerics: {name} must not be empty, got {x.shape}")
        largest = np.max(np.abs(x.astype(np.float64)))
        if not largest < FP16_OVERFLOW:
            raise ValueError(
                f"attention_numerics: {name} must be finite and within float16, got {largest:g}"
            )
    if q.ndim == 3:
        q, k, v = q[None], k[None], v[None]
        options |= {"mask": options["mask"][None]} if mask is not None else {}
    exact = functools.cache(
        lambda dtype: _exact(_rounded(q, dtype), _rounded(k, dtype), _rounded(v, dtype), **options)
    )
    errors = {}
    for name, variant in variants.items():
        operand = jnp.dtype(arithmetic(variant.precision, variant.statistics).operand)
        held = (x.astype(np.promote_types(np.float32, operand)) for x in (q, k, v))
        recovers = variant.attention is pasa_attention and variant.statistics != "exact_offset"
        got = _run(*held, variant=variant, beta=beta if recovers else None, **options)
        errors[name] = _error(np.asarray(got, np.float64), exact(operand))
    half = np.dtype(np.float16)
    plain, shifted = _ranges(_rounded(q, half), _rounded(k, half), beta, **options)
    return AttentionNumerics(
        scores=plain,
        shifted=shifted,
        input_rounding=_error(exact(half), exact(np.dtype(np.float64))),
        errors=errors,
    )


@functools.partial(jax.jit, static_argnames=("variant", "beta", "block_size", "causal", "scale"))
def _run(q, k, v, mask=None, *, variant: Variant, beta, **options):
    if beta is not None:
        options["beta"] = beta
    return variant.attention(
        q, k, v, mask=mask, precision=variant.precision, statistics=variant.statistics, **options
    )


def _rounded(x: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    return x.astype(dtype).astype(np.float64)


def _error(got: np.ndarray, exact: np.ndarray) -> Error:
    rms = float(np.sqrt(np.mean(exact**2)))
    rmse = float(np.sqrt(np.mean((got - exact) ** 2))) if np.isfinite(got).all() else float("nan")
    bad = float(np.mean(~np.isfinite(got).all(axis=-1)))
    return Error(rmse=rmse, relative_rmse=rmse / rms if rms else float("nan"), bad_rows=bad)


def _heads(q, k, mask, causal) -> Iterator[tuple[tuple, np.ndarray, np.ndarray, np.ndarray]]:
    """(batch, head, kv head), its queries and keys, and which keys each query sees."""
    (batch, queries, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    causal = np.tri(queries, keys, dtype=bool) if causal else np.ones((queries, keys), bool)
    full = (batch, heads, queries, keys)
    mask = np.broadcast_to(True if mask is None else mask, full)
    for b, h in np.ndindex(batch, heads):
        kv = h * kv_heads // heads
        yield (b, h, kv), q[b, :, h], k[b, :, kv], mask[b, h] & causal


def _exact(q, k, v, *, block_size, causal, scale, mask=None) -> np.ndarray:
    """Softmax attention in float64, [batch, q_len, heads, dv]; zeros where nothing is seen."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for (b, h, kv), queries, keys, seen in _heads(q, k, mask, causal):
        scores = np.where(seen, scale * (queries @ keys.T), -np.inf)
        top = np.max(scores, axis=-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
        mass = weights.sum(axis=-1, keepdims=True)
        out[b, :, h] = weights @ v[b, :, kv] / np.where(mass == 0, 1, mass)
    return out


def _ranges(q, k, beta, *, block_size, causal, scale, mask=None) -> tuple[Range, Range]:
    """Ranges of q k^T and of q (M k)^T, with M and its product rounded to float16."""
    size = min(block_size, k.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    matrix = shift_matrix(size, pasa_beta(size) if beta is None else beta, scale)
    starts = np.minimum(np.arange(0, k.shape[1], size), k.shape[1] - size)
    tallies = _Tally(), _Tally()
    for _, queries, keys, seen in _heads(q, k, mask, causal):
        moved = np.empty_like(keys)
        for start in starts[::-1]:  # a key of two blocks belongs to the earlier one
            block = slice(start, start + size)
            moved[block] = _rounded(matrix @ keys[block], np.float16)
        for tally, these in zip(tallies, (keys, moved), strict=True):
            tally.add(queries @ these.T, seen)
    return tallies[0].range(), tallies[1].range()


class _Tally:
    """Running smallest, largest and overflow counts."""

    def __init__(self) -> None:
        self.smallest, self.largest = np.inf, -np.inf
        self.overflowing = self.scores = self.bad_rows = self.rows = 0

    def add(self, scores: np.ndarray, seen: np.ndarray) -> None:
        over = seen & (np.abs(scores) >= FP16_OVERFLOW)
        self.smallest = min(self.smallest, float(np.min(scores, where=seen, initial=np.inf)))
        self.largest = max(self.largest, float(np.max(scores, where=seen, initial=-np.inf)))
        self.overflowing += int(over.sum())
        self.scores += int(seen.sum())
        self.bad_rows += int(over.any(axis=-1).sum())
        self.rows += len(scores)

    def range(self) -> Range:
        return Range(
            self.smallest,
            self.largest,
            self.overflowing / max(self.scores, 1),
            self.bad_rows / self.rows,
        )
