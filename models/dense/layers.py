"""Layers of a dense decoder, written for one tensor-parallel rank.

    x <- x + dropout(W_o attention(norm(x)));    x <- x + dropout(W_2 act(W_1 norm(x)))

The column-parallel maps (queries, keys, values, W_1) hold a rank's columns, the row-parallel ones
(W_o, W_2) its rows; `TensorSplit` joins them. What saves memory when it is differentiated is one
kernel each (`fused`): it keeps its arguments and computes the rest again.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cmjax.models.dense.config import DenseConfig
from cmjax.models.dense.tensor import TensorSplit
from cmjax.program.mark import fused

Recompute = Literal["none", "selective", "full"]
"""What the backward pass computes again: nothing, the core of attention (its scores and what is
made of them), or the whole layer."""
CORE = "core"
"""Scope of the core of attention."""


class Columns(nnx.Module):
    """Parameters of y = x W + b; `TensorSplit.columns` does the product."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def add_bias(self, y: Float[Array, "*batch outputs"]) -> Float[Array, "*batch outputs"]:
        return y if self.bias is None else y + self.bias[...]


class Norm(nnx.Module):
    """Layer norm or RMS norm, in float32."""

    def __init__(self, size: int, *, rms: bool, dtype):
        self.gain = nnx.Param(jnp.ones((size,), dtype))
        self.shift = None if rms else nnx.Param(jnp.zeros((size,), dtype))

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        def norm(x, gain, shift=None):
            y = x.astype(jnp.float32)
            if shift is not None:
                y = y - jnp.mean(y, -1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
            y = y * gain.astype(jnp.float32)
            return (y if shift is None else y + shift.astype(jnp.float32)).astype(x.dtype)

        shift = () if self.shift is None else (self.shift[...],)
        return fused("norm")(norm)(x, self.gain[...], *shift)


class Attention(nnx.Module):
    """Causal attention over this rank's heads."""

    def __init__(self, config: DenseConfig, split: TensorSplit, *, dtype, rngs: nnx.Rngs):
        d, size = config.hidden, config.head_size
        self.config, self.split = config, split
        self.heads = config.heads // split.ranks
        self.kv_heads = config.key_heads // split.ranks

        def columns(width):
            return Columns(d, width, bias=config.biases, dtype=dtype, rngs=rngs)

        self.query = columns(self.heads * size)
        self.key = columns(self.kv_heads * size)
        self.value = columns(self.kv_heads * size)

    def __call__(self, x, *, queries=None, key=None, recompute: Recompute = "none"):
        """What this rank has of [batch, sequence, hidden] -> [batch, sequence, own heads * head
        size]; `queries` are where the queries come from, by default `x`."""
        config, size = self.config, self.config.head_size
        maps = [self.query, self.key, self.value]
        if queries is None:
            q, k, v = self.split.columns(x, *(m.kernel[...] for m in maps))
        else:
            (q,) = self.split.columns(queries, self.query.kernel[...])
            k, v = self.split.columns(x, self.key.kernel[...], self.value.kernel[...])
        batch, sequence = q.shape[:2]
        q, k, v = (m.add_bias(y) for m, y in zip(maps, (q, k, v), strict=True))

        def heads(y, count):
            return y.reshape(batch, sequence, count, size)

        q, k, v = heads(q, self.heads), heads(k, self.kv_heads), heads(v, self.kv_heads)
        first = self.split.context_rank * sequence
        if config.positions == "rotary":
            q, k = rotate(q, first), rotate(k, first)
        k, v = self.split.whole_context(k), self.split.whole_context(v)
        known = (3, 4) if self.split.context == 1 else (4,)
        core = _core if recompute == "none" else jax.checkpoint(_core, static_argnums=known)
        with jax.named_scope(CORE):
            found = core(q, k, v, first, config.dropout, key)
        return found.reshape(batch, sequence, self.heads * size)


def _core(q, k, v, first, rate: float, key):
    """softmax(q k^T / sqrt(size)) v, later positions masked; keys may serve groups of queries. The
    queries' positions begin at `first`."""
    batch, sequence, heads, size = q.shape
    grouped = q.reshape(batch, sequence, k.shape[2], heads // k.shape[2], size)
    scores = jnp.einsum("bqngd,bknd->bngqk", grouped, k)

    def softmax(scores, *first):
        scores = scores.astype(jnp.float32) * size**-0.5
        if first:
            past = jnp.arange(k.shape[1]) <= jnp.arange(sequence)[:, None] + first[0]
        else:
            past = jnp.tril(jnp.ones((sequence, sequence), bool))
        return jax.nn.softmax(jnp.where(past, scores, -1e30), axis=-1).astype(q.dtype)

    later = () if isinstance(first, int) else (first,)
    weights = dropout(fused("softmax")(softmax)(scores, *later), rate, key)
    return jnp.einsum("bngqk,bknd->bqngd", weights, v).reshape(batch, sequence, heads, size)


class FeedForward(nnx.Module):
    """W_2 gelu(W_1 x), or W_2 (silu(W_g x) * W_1 x); a rank's columns and rows."""

    def __init__(self, config: DenseConfig, split: TensorSplit, *, dtype, rngs: nnx.Rngs):
        d, own = config.hidden, config.ffn // split.ranks
        bias = config.biases
        init = nnx.initializers.normal(0.02)
        self.split = split
        self.up = nnx.Param(init(rngs.params(), (d, own), dtype))
        self.up_bias = nnx.Param(jnp.zeros((own,), dtype)) if bias else None
        self.gate = nnx.Param(init(rngs.params(), (d, own), dtype)) if config.gated else None
        self.down = nnx.Param(_rows(config)(rngs.params(), (own, d), dtype))

    def __call__(self, x):
        """What this rank has of [batch, sequence, hidden] -> its addend of the same, whole."""
        wide = [self.up[...]] + ([] if self.gate is None else [self.gate[...]])
        up, *gate = self.split.columns(x, *wide)
        bias = () if self.up_bias is None else (self.up_bias[...],)

        def activate(up, *rest):
            rest = list(rest)
            up = up + rest.pop(0) if bias else up
            return jax.nn.silu(rest[0]) * up if gate else jax.nn.gelu(up, approximate=True)

        return fused("activation")(activate)(up, *bias, *gate) @ self.down[...]


def _rows(config: DenseConfig):
    """Of the maps into the residual stream: scaled down by its number of additions."""
    return nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5)


class Block(nnx.Module):
    """A transformer layer; as a query layer its queries come from elsewhere."""

    def __init__(self, config: DenseConfig, split: TensorSplit, *, dtype, rngs: nnx.Rngs):
        d, rms = config.hidden, config.norm == "rms"
        self.config, self.split = config, split
        self.attention_norm = Norm(d, rms=rms, dtype=dtype)
        self.attention = Attention(config, split, dtype=dtype, rngs=rngs)
        own = config.hidden // split.ranks
        self.output = nnx.Param(_rows(config)(rngs.params(), (own, d), dtype))
        self.output_bias = nnx.Param(jnp.zeros((d,), dtype)) if config.biases else None
        self.ffn_norm = Norm(d, rms=rms, dtype=dtype)
        self.ffn = FeedForward(config, split, dtype=dtype, rngs=rngs)
        self.ffn_bias = nnx.Param(jnp.zeros((d,), dtype)) if config.biases else None

    def __call__(self, x, *, queries=None, keys=None, recompute: Recompute = "none"):
        """One layer on what this rank has of the sequence.

        Args:
          x: [batch, sequence (or this rank's part of it), hidden].
          queries: what a query layer's queries are made of, [batch, sequence, hidden].
          keys: three PRNG keys for dropout, of the same rank everywhere but in attention.
          recompute: "selective" keeps no scores; "full" is done around this call.
        """
        keys = (None,) * 3 if keys is None else keys
        h = self.attention_norm(x)
        h = self.attention(h, queries=queries, key=keys[0], recompute=recompute)
        x = self._add(x, self.split.leave(h @ self.output[...]), self.output_bias, keys[1])
        h = self.split.leave(self.ffn(self.ffn_norm(x)))
        return self._add(x, h, self.ffn_bias, keys[2])

    def _add(self, x, y, bias, key):
        """x + dropout(y + bias): one kernel, as nothing outside needs what is in between. Its
        derivative keeps the mask alone, being linear in the rest."""
        bias = () if bias is None else (bias[...],)
        rate = self.config.dropout
        kept = () if key is None or rate == 0 else (_kept(key, rate, y.shape),)

        def add(x, y, *rest):
            rest = list(rest)
            y = y + rest.pop(0) if bias else y
            return x + (_drop(y, rest[0], rate) if kept else y)

        return fused("residual")(add)(x, y, *bias, *kept)


def dropout(x: Array, rate: float, key) -> Array:
    """Zero a share of the elements, and scale up the rest; itself without a key or at rate 0. The
    backward pass keeps one byte an element."""
    if key is None or rate == 0:
        return x

    def drop(x, kept):
        return _drop(x, kept, rate)

    return fused("dropout")(drop)(x, _kept(key, rate, x.shape))


def _kept(key, rate: float, shape):
    return jax.random.bernoulli(key, 1 - rate, shape)


def _drop(x, kept, rate: float):
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def rotate(x: Float[Array, "batch sequence heads size"], first: Array | int = 0) -> Array:
    """Rotary position embedding (arXiv 2104.09864) of positions from `first` on, halves of the head
    size paired; one kernel."""

    def turn(x, *first):
        half = x.shape[-1] // 2
        rate = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
        place = jnp.arange(x.shape[1], dtype=jnp.float32) + sum(first)
        angle = place[:, None, None] * rate[None, None, :]
        cos, sin = jnp.cos(angle)[None], jnp.sin(angle)[None]
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)

    return fused("rotate")(turn)(x, *(() if isinstance(first, int) else (first,)))
