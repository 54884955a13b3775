"""The ends of a dense decoder, and the whole of it for one rank.

Words are split over tensor-parallel ranks by rows of the embedding. The loss never has the logits
of all words on one rank: loss = log sum_r sum_{v in r} exp(z_v) - z_target  (1909.08053).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cmjax.models.dense.config import DenseConfig
from cmjax.models.dense.layers import Block, Norm, Recompute, dropout
from cmjax.models.dense.tensor import TensorSplit
from cmjax.program.mark import fused


def own_words(config: DenseConfig, split: TensorSplit) -> int:
    """Rows of the word embedding on a rank; the vocabulary is padded where it does not divide."""
    return -(-config.vocab // split.ranks)


class Embedding(nnx.Module):
    """Words and positions: the first stage's end of the model."""

    def __init__(self, config: DenseConfig, split: TensorSplit, *, dtype, rngs: nnx.Rngs):
        self.config, self.split = config, split
        init = nnx.initializers.normal(0.02)
        shape = (own_words(config, split), config.hidden)
        self.words = nnx.Param(init(rngs.params(), shape, dtype))
        learned = config.positions == "learned"
        positions = (config.sequence, config.hidden)
        self.positions = nnx.Param(init(rngs.params(), positions, dtype)) if learned else None

    def __call__(self, tokens: Int[Array, "batch sequence"], key=None):
        """[batch, sequence] -> what this rank has of [batch, sequence, hidden]."""
        rows = self.words.shape[0]
        own = tokens - self.split.rank * rows
        inside = (own >= 0) & (own < rows)
        x = jnp.take(self.words[...], jnp.clip(own, 0, rows - 1), axis=0)
        x = self.split.leave(jnp.where(inside[..., None], x, jnp.zeros((), x.dtype)))
        if self.positions is not None:
            x = x + own_positions(self.positions[...], x.shape[1], self.split)
        return dropout(x, self.config.dropout, key)


class Output(nnx.Module):
    """The last stage's end: final norm, PanGu-alpha's query layer, and the loss."""

    def __init__(self, config: DenseConfig, split: TensorSplit, *, dtype, rngs: nnx.Rngs):
        self.config, self.split = config, split
        init = nnx.initializers.normal(0.02)
        self.norm = Norm(config.hidden, rms=config.norm == "rms", dtype=dtype)
        query, positions = config.query_layer, (config.sequence, config.hidden)
        self.query = Block(config, split, dtype=dtype, rngs=rngs) if query else None
        self.next_position = nnx.Param(init(rngs.params(), positions, dtype)) if query else None

    def __call__(self, x, words, targets: Int[Array, "batch sequence"], *, keys=None,
                 recompute: Recompute = "none") -> Float[Array, ""]:  # fmt: skip
        """Mean loss in nats over all tokens; `words` is this rank's part of the output matrix."""
        x = self.norm(x)
        if self.query is not None and self.next_position is not None:
            queries = own_positions(self.next_position[...], x.shape[1], self.split)
            queries = jnp.broadcast_to(queries, x.shape)
            x = self.query(x, queries=queries, keys=keys, recompute=recompute)
        (logits,) = self.split.columns(x, words.T)
        return _loss(logits, targets, self.config, self.split)


def own_positions(table, part, split: TensorSplit) -> Float[Array, "part hidden"]:
    """Rows of a table of positions for the part of the sequence that this rank has. With sequence
    parallelism every rank reads its own rows, and their gradients are added up."""
    if split.context > 1:
        length = len(table) // split.context
        table = jax.lax.dynamic_slice_in_dim(table, split.context_rank * length, length, axis=0)
    if split.ranks == 1 or not split.sequence:
        return table[:part]
    table = split.enter_whole(table)
    return jax.lax.dynamic_slice_in_dim(table, split.rank * part, part, axis=0)


def _loss(logits, targets, config: DenseConfig, split: TensorSplit):
    rows = logits.shape[-1]
    first = split.rank * rows
    padded = rows * split.ranks > config.vocab

    def exponentials(logits, top):
        z = logits.astype(jnp.float32) - top[..., None]
        if padded:
            z = jnp.where(first + jnp.arange(rows) < config.vocab, z, -1e30)
        own = targets - first
        inside = (own >= 0) & (own < rows)
        picked = jnp.take_along_axis(z, jnp.clip(own, 0, rows - 1)[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.exp(z), -1), jnp.where(inside, picked, 0.0)

    top = split.largest(jnp.max(logits, -1).astype(jnp.float32))
    total, picked = fused("loss")(exponentials)(logits, top)
    return jnp.mean(jnp.log(split.sum(total)) - split.sum(picked))


class DenseModel(nnx.Module):
    """A whole dense decoder on one tensor-parallel rank; its layers are stacked.

    >>> from cmjax.models.dense import DenseModel, preset
    >>> model = DenseModel(preset("pangu-tiny"), rngs=nnx.Rngs(0))
    >>> tokens = jnp.arange(65)[None] % 256
    >>> f"{float(model.loss(tokens)):.1f}"  # near log 256 = 5.545
    '5.5'
    """

    def __init__(
        self,
        config: DenseConfig,
        split: TensorSplit | None = None,
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        split = split or TensorSplit()
        self.config, self.split = config, split
        make = nnx.vmap(lambda rngs: Block(config, split, dtype=dtype, rngs=rngs))
        self.embedding = Embedding(config, split, dtype=dtype, rngs=rngs)
        self.blocks = make(rngs.split(config.blocks)) if config.blocks else None
        self.output = Output(config, split, dtype=dtype, rngs=rngs)
        shape, init = (own_words(config, split), config.hidden), nnx.initializers.normal(0.02)
        self.words = None if config.tied else nnx.Param(init(rngs.params(), shape, dtype))

    def loss(self, tokens: Int[Array, "batch length"], recompute: Recompute = "none"):
        """Mean next-token loss over windows of `sequence + 1` tokens, without dropout."""
        x = self.embedding(tokens[:, :-1])
        if self.blocks is not None:
            graph, stacked = nnx.split(self.blocks)
            x = run_blocks(graph, stacked, x, recompute)
        matrix = self.embedding.words if self.words is None else self.words
        return self.output(x, matrix[...], tokens[:, 1:], recompute=recompute)


def run_blocks(graph, stacked, x, recompute: Recompute = "none"):
    """`x` through layers whose parameters have a leading axis, one after another."""

    def layer(x, params):
        return nnx.merge(graph, params)(x, recompute=recompute), None

    body = jax.checkpoint(layer) if recompute == "full" else layer
    return jax.lax.scan(body, x, stacked)[0]
