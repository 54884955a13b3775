"""PASA, attention whose scores fit half precision, as a JAX primitive; and FlashAttention.

    K'_j = scale (K_j - beta mean(K_j)),   S' = Q K'^T,   S = S' + gain mean(S')

Chen et al. 2025, "Online Pseudo-average Shifting Attention (PASA) for Robust Low-precision LLM
Inference" (arXiv 2503.01873). Keys with a large common part give scores beyond 65504, the largest
float16. PASA takes the mean over a block of keys out of the scores before they are stored, by a
product with a constant matrix, and puts it back into the running maximum and sum, where it costs a
few words per row. The result is softmax attention: nothing is approximated but by rounding.

The arithmetic is in `blockwise`, the constants in `pasa_shift`.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from cmjax.primitives.attention.arguments import check, number, operands, parameters
from cmjax.primitives.attention.blockwise import (
    Blocks,
    arithmetic,
    blockwise_attention,
    group_heads,
    group_mask,
    mask_and_bias,
    of_block,
    product,
    ungroup_heads,
    used_by_any,
)
from cmjax.primitives.attention.exact import CAP_INSTRUCTIONS
from cmjax.primitives.attention.hidden import keep, usable_keys
from cmjax.primitives.attention.merge import with_sinks
from cmjax.primitives.attention.pasa_shift import pasa_beta, recovery_gain
from cmjax.primitives.define import Zero, define
from cmjax.program import Operand, Size, Work, cost_rule, matmul_flops
from cmjax.program.size import minimum

Precision = Literal["fp16", "fp16_fp32", "fp16_operands", "bf16", "fp32", "fp64"]
Statistics = Literal["fp32", "storage", "exact_offset"]
Shift = Literal["auto", "gemm", "mean"]


def pasa_attention(
    q: Float[Array, "*batch q_len heads d"],
    k: Float[Array, "*batch kv_len kv_heads d"],
    v: Float[Array, "*batch kv_len kv_heads dv"],
    *,
    beta: float | None = None,
    block_size: int = 128,
    mask: Bool[Array, "*#batch #heads #q_len #kv_len"] | None = None,
    bias: Float[Array, "*#batch #heads #q_len #kv_len"] | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    scale: float | None = None,
    precision: Precision = "fp16",
    statistics: Statistics = "fp32",
    shift: Shift = "auto",
    return_lse: bool = False,
) -> Any:
    """Softmax attention in half precision that does not overflow; drop-in for `jax.nn`'s.

        softmax(scale q k^T) v       arguments as in `jax.nn.dot_product_attention`

    Args:
      q, k, v: queries, keys, values, with or without a batch axis; floating point, rounded to the
        format of `precision` first. `heads` is a multiple of `kv_heads` (GQA, MQA); query head `h`
        reads key head `h * kv_heads // heads`. `dv` need not be `d` (MLA: v is the latent, k the
        latent and the rotary key).
      beta: share of a block's mean that is removed, in [0, 1); [0, 1] with the exact offset.
        Default: `pasa_beta` for the format and the block; 1 with the exact offset.
      block_size: keys per block. Any `kv_len` goes.
      mask: true where a query may see a key; the rank of q. Keys that no query sees may hold
        anything. A shift is shared by the queries of a block's keys: a key far off the others that
        only some of them see costs all of them accuracy in half precision.
      bias: added to the scores, after `scale` and `softcap` (ALiBi, relative positions); -inf
        hides.
      causal: query `i` sees keys 0 to `i`, as in `jax.nn`.
      window: a query sees this many newest keys, its own included; needs `causal`.
      softcap: c > 0 turns scores s into c tanh(s / c) (Gemma 2).
      sinks: per head, a score that takes part in the softmax and has no value (GPT-OSS).
      scale: factor on the scores, positive; default `d ** -0.5`.
      precision: formats of what is stored. Products accumulate in float32 always.
        "fp16": Q, K, V, K', S', S' - m, P and P V in float16; "bf16": the same in bfloat16.
        "fp16_fp32": S' and the operands in float16, softmax in float32 (the paper's hybrid).
        "fp16_operands": operands in float16, S' in float32. "fp32", "fp64": nothing is rounded.
      statistics: formats of what is kept per row: averages, maxima, sums and the accumulator.
        "fp32": float32 (float64 with "fp64"), the default.
        "storage": in the format of S', as published; for "fp16" and "bf16".
        "exact_offset": float32, and the removed mean is computed from Q and the float32 mean of K
        instead of recovered from S'. Not the paper's; needs the "mean" shift.
      shift: "gemm": a product with a constant matrix, rounded to the operand format, as published;
        "mean": subtract the mean element by element. "auto": "gemm" where at least `block_size / 2`
        query rows reuse a shifted block (then it costs no more than attention itself), else "mean",
        as in decoding.
      return_lse: also return the log-sum-exp of the scores, for `merge_by_lse`.

    Returns: [*batch, q_len, heads, dv] in the dtype of q; with `return_lse` also the float32
      [*batch, q_len, heads]. A query that sees nothing gets zeros and a log-sum-exp of -inf (with
      sinks, of its sink). With a mask, one that sees a key or value that is not finite in the
      operand format gets NaN, and others are spared.
    Raises: TypeError, ValueError: an argument is not as described; the message names it.
    Gradient: that of exact attention at the given q, k, v, in float32 and block by block: rounding
      is passed straight through and nothing can overflow in it.

    Relative RMSE against float64 in "fp16", by the largest |q k^T| (`python -m studies.pasa`: 1,280
    keys, d = 128, V of zero mean; uniform 0 ± 5, 10 ± 5, 30 ± 0.5, and resonance):

                                        467   15,032  115,834  233,903
      flash_attention, "storage"     3.0e-3   7.3e-2      NaN      NaN
      "storage"                      3.7e-3   5.5e-2   3.5e-1   4.6e-1
      "fp32"                         2.3e-3   9.2e-3   8.0e-2   4.0e-2
      "exact_offset"                 1.9e-3   3.7e-3   1.6e-3   2.9e-3

    The published statistics never overflow, but under a strong bias they weigh blocks wrongly, and
    with a sharp softmax that selects wrong tokens. Recovery multiplies the rounding of S' by the
    gain; the exact offset does not, and is the choice where accuracy counts most.
    Source: PASA (arXiv:2503.01873), algorithm 1; the block's mean is recovered with the gain
      beta / (1 - beta).
    Example: scores of 115,200 are beyond float16, and their softmax is right all the same.

      >>> q = jnp.full((4, 1, 128), 30.0)
      >>> v = jnp.arange(4.0)[:, None, None]
      >>> float(pasa_attention(q, q, v)[0, 0, 0])
      1.5
      >>> float(flash_attention(q, q, v, precision="fp16")[0, 0, 0])
      nan
    """
    name = "pasa_attention"
    q, k, v = operands(name, q, k, v)
    if shift not in ("auto", "gemm", "mean"):
        raise ValueError(f"{name}: shift must be 'auto', 'gemm' or 'mean', got {shift!r}")
    exact_offset = statistics == "exact_offset"
    params = parameters(name, q, precision, statistics, block_size, scale, causal, window, softcap)
    if exact_offset and shift == "gemm":
        raise ValueError(
            f"{name}: statistics='exact_offset' needs the mean itself: shift must be 'mean'"
        )
    size = Blocks.of(k.shape[-3], block_size).size
    if shift == "auto":
        rows = q.shape[-3] * (q.shape[-2] // k.shape[-2])
        few = isinstance(rows, int) and 2 * rows < size
        shift = "mean" if few or exact_offset else "gemm"
    operand = arithmetic(precision, statistics).operand
    smallest = float(jnp.finfo(operand).smallest_normal)
    if params["scale"] < smallest:
        raise ValueError(
            f"{name}: scale, folded into the keys, must be at least {smallest:.2g} to be held in "
            f"{jnp.dtype(operand)}, got {params['scale']}; multiply q by the rest"
        )
    if beta is None:
        beta = 1.0 if exact_offset else pasa_beta(size, operand)
    beta = number(name, "beta", beta)
    if not (0 <= beta < 1 or (exact_offset and beta == 1)):
        interval = "[0, 1]" if exact_offset else "[0, 1)"
        raise ValueError(f"{name}: beta must lie in {interval}, got {beta}")
    if shift == "gemm":
        recovery_gain(size, beta, params["scale"], operand)  # raises if there is none
    out, lse = _bind(pasa_attention_p, q, k, v, mask, bias, shift=shift, beta=beta, **params)
    return _result(name, out, lse, sinks, return_lse)


def flash_attention(
    q: Float[Array, "*batch q_len heads d"],
    k: Float[Array, "*batch kv_len kv_heads d"],
    v: Float[Array, "*batch kv_len kv_heads dv"],
    *,
    block_size: int = 128,
    mask: Bool[Array, "*#batch #heads #q_len #kv_len"] | None = None,
    bias: Float[Array, "*#batch #heads #q_len #kv_len"] | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    scale: float | None = None,
    precision: Precision = "fp16_operands",
    statistics: Literal["fp32", "storage"] = "fp32",
    return_lse: bool = False,
) -> Any:
    """FlashAttention in the same arithmetic, without a shift: what PASA is compared with.

    S = q k^T is stored unscaled. In the paper's words, "fp16_operands" is FA(FP32), "fp16_fp32" is
    FA(FP16-FP32), and "fp16" with "storage" is FA(FP16). The last two give NaN where |q k^T| passes
    65504. Arguments, result and errors as in `pasa_attention`.
    Source: Dao et al. 2022 (arXiv:2205.14135), algorithm 1.
    Example:

      >>> q = jnp.zeros((4, 1, 16))
      >>> out, lse = flash_attention(q, q, q + 1, return_lse=True)
      >>> out.shape, round(float(lse[0, 0]), 4)
      ((4, 1, 16), 1.3863)
    """
    name = "flash_attention"
    q, k, v = operands(name, q, k, v)
    if statistics == "exact_offset":
        raise ValueError(f"{name}: statistics must be 'fp32' or 'storage': nothing is shifted here")
    params = parameters(name, q, precision, statistics, block_size, scale, causal, window, softcap)
    out, lse = _bind(flash_attention_p, q, k, v, mask, bias, shift="none", beta=0.0, **params)
    return _result(name, out, lse, sinks, return_lse)


def _result(name, out, lse, sinks, return_lse) -> Any:
    if sinks is not None:
        sinks = jnp.asarray(sinks)
        if sinks.shape != lse.shape[-1:] or not jnp.issubdtype(sinks.dtype, jnp.floating):
            raise ValueError(
                f"{name}: sinks must be floating point [{lse.shape[-1]}], one per query head, got "
                f"{sinks.dtype}{list(sinks.shape)}"
            )
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _bind(primitive, q, k, v, mask, bias, **params):
    more = [jnp.asarray(x) for x in (mask, bias) if x is not None]
    return primitive.bind(q, k, v, *more, has_bias=bias is not None, **params)


def _jvp(primitive, primals, tangents, **params):
    """Derivative of exact softmax attention, with P from scores relative to the keys' mean.

        dS = scale (dq k^T + q dk^T) (1 - tanh^2) + dbias,   D = rowsum(P dS)
        dlse = D,   dout = (P dS) v + P dv - D out

    Neither a constant added to all keys changes P, nor one added to all values dout, so both means
    are left out: the large common parts that PASA is about cancel exactly instead of in rounding.
    Of keys they are kept under a cap, which bounds scores but not their differences.
    """
    q, k, v, *more = primals
    out, lse = primitive.bind(*primals, **params)
    wide = lse.dtype

    def mean(x):  # any constant would do
        return lax.stop_gradient(jnp.mean(x, axis=-3, keepdims=True))

    q, k, v = (x.astype(wide) for x in (q, k, v))
    kv_heads, block_size, queries = k.shape[-2], params["block_size"], q.shape[-3]
    scale, causal, softcap = params["scale"], params["causal"], params.get("softcap")
    window, has_bias = params.get("window"), params.get("has_bias", False)
    seen, bias = mask_and_bias(more, has_bias, kv_heads)
    used = used_by_any(seen, queries, k.shape[-3], causal, window)
    if used is not None:  # zeros for what does not count: not in the mean, nor times a weight of 0
        kept = usable_keys(used, k, v).kept
        k, v = keep(k, kept), keep(v, kept)
    k_mean = mean(k) if softcap is None else jnp.zeros_like(k[..., :1, :, :])
    k, v = k - k_mean, v - mean(v)
    exact = params | {
        "precision": "fp64" if wide == jnp.float64 else "fp32",
        "statistics": "fp32",
        "shift": "none",
        "beta": 0.0,
    }
    out_centred, lse_centred = flash_attention_p.bind(q, k, v, *more, **exact)
    dq, dk, dv = (None if type(t) is Zero else t.astype(wide) for t in tangents[:3])
    dbias = None
    if has_bias and type(tangents[-1]) is not Zero:
        dbias = group_mask(tangents[-1].astype(wide), kv_heads)
    blocks = Blocks.of(k.shape[-3], block_size)
    q, out_centred = group_heads(q, kv_heads), group_heads(out_centred, kv_heads)
    dq = None if dq is None else group_heads(dq, kv_heads)
    lse_centred = group_heads(lse_centred[..., None], kv_heads)
    unseen = jnp.isneginf(lse_centred)
    lse_centred = jnp.where(unseen, 0, lse_centred)

    @jax.checkpoint  # reverse mode keeps no scores
    def block(j):
        keys, values = blocks.take(k, j, -3), blocks.take(v, j, -3)
        logits, slope = scale * product("...kgtd,...ikd->...kgti", q, keys), 1.0
        if softcap is not None:
            inner = jnp.tanh(logits / softcap)
            logits, slope = softcap * inner, 1 - inner * inner
        if bias is not None:
            logits += of_block(blocks, bias, j).astype(wide)
        logits -= lse_centred
        visible = blocks.visible(j, queries, seen, causal, window)
        p = jnp.exp(logits if visible is None else jnp.where(visible, logits, -jnp.inf))
        ds = jnp.zeros_like(p)
        if dq is not None:
            ds += scale * product("...kgtd,...ikd->...kgti", dq, keys)
        if dk is not None:
            ds += scale * product("...kgtd,...ikd->...kgti", q, blocks.take(dk, j, -3))
        ds *= slope
        if dbias is not None:
            ds += of_block(blocks, dbias, j)
        weighted = p * ds
        moved = product("...kgti,...ikd->...kgtd", weighted, values)
        if dv is not None:
            moved += product("...kgti,...ikd->...kgtd", p, blocks.take(dv, j, -3))
        return moved, jnp.sum(weighted, axis=-1, keepdims=True)

    moved, row = blocks.fold(block, lambda old, new, j: jax.tree.map(jnp.add, old, new))
    dout = moved - row * out_centred
    dlse = row
    if dq is not None and softcap is None:
        dlse += scale * product("...kgtd,...ikd->...kgti", dq, k_mean)
    dlse = jnp.where(unseen, 0, dlse)
    return [out, lse], [
        ungroup_heads(dout).astype(out.dtype),
        ungroup_heads(dlse)[..., 0],
    ]


pasa_attention_p = define(
    "cm_pasa_attention",
    blockwise_attention,
    check=functools.partial(check, "pasa_attention"),
    jvp=_jvp,
    multiple_results=True,
)
flash_attention_p = define(
    "cm_flash_attention",
    blockwise_attention,
    check=functools.partial(check, "flash_attention"),
    jvp=_jvp,
    multiple_results=True,
)


# Vector instructions per score: mean (PASA) or scale (FlashAttention), maximum, subtract,
# exponential (4), sum. Where products read or write another format, one more to convert.
_SCORE_INSTRUCTIONS = 8.0
_SHIFT_INSTRUCTIONS = 3.0  # per key element, if not a product: sum, multiply-subtract, scale
# Per row and block: two multiplications and an addition for each column of the accumulator, and
# some 16 for averages, offsets, maxima and sums.
_MERGE_INSTRUCTIONS, _ROW_INSTRUCTIONS = 3.0, 16.0


@cost_rule(pasa_attention_p)
@cost_rule(flash_attention_p)
def _cost(
    q: Operand,
    k: Operand,
    v: Operand,
    *more,
    out,
    mesh,
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
) -> Work:
    """A FlashAttention kernel in the variant's formats, plus the shift.

    A shift by product costs 2 n d FLOP per key and head on the cube cores, n / (2 rows) of what
    attention costs, and writes the shifted keys for later query blocks to read; one element by
    element runs on the vector cores and stays on chip. Blocks above the diagonal, and those behind
    the window, are skipped.
    """
    form = arithmetic(precision, statistics)
    queries, keys = q.shape[-3], k.shape[-3]
    scores = q.size / q.shape[-1] * keys
    if window is not None:
        scores = q.size / q.shape[-1] * _mean_seen(queries, keys, window)
    elif causal:
        scores = scores * _causal_share(queries, keys)
    flops = scores * 2.0 * (q.shape[-1] + v.shape[-1])
    vector = _itemsize(form.vector)
    converted = (form.scores != form.vector) + (form.operand != form.vector)
    further = (0.0 if softcap is None else CAP_INSTRUCTIONS) + has_bias
    vector_bytes = scores * (vector * (_SCORE_INSTRUCTIONS + converted + further))
    per_block = v.shape[-1] * _MERGE_INSTRUCTIONS + _ROW_INSTRUCTIONS
    vector_bytes = vector_bytes + scores / block_size * per_block * _itemsize(form.statistics)
    shifted = Size()
    if shift == "gemm":
        flops = flops + k.size * (2.0 * block_size)
        shifted = k.size * _itemsize(form.operand)
    elif shift == "mean":
        vector_bytes = vector_bytes + k.size * (_itemsize(form.operand) * _SHIFT_INSTRUCTIONS)
        if statistics == "exact_offset":  # one more score per block
            flops = flops + q.size * (keys / block_size) * 2.0
    return Work(
        kind="attention",
        flops=flops,
        vector_bytes=vector_bytes,
        read_bytes=sum((x.nbytes for x in (q, k, v, *more)), shifted),
        write_bytes=sum((x.nbytes for x in out), shifted),
        **matmul_flops(form.operand, flops),
    )


def _itemsize(dtype) -> float:
    return float(jnp.dtype(dtype).itemsize)


def _mean_seen(queries: Size, keys: Size, window: int) -> Size:
    """Keys in the window of a query, on average: the first queries see fewer."""
    seen = minimum(minimum(queries, Size.of(window)), keys)
    return seen * (1.0 - 0.5 * (seen / queries))


def _causal_share(queries: Size, keys: Size) -> Size:
    """Share of the scores on or below the diagonal that starts at the first query and key."""
    difference = (queries - keys).constant
    if difference is not None and difference > 0:
        return Size(1.0) - 0.5 * (keys / queries)
    return 0.5 * (queries / keys)
