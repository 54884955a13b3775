"""The decoder: embedding, dense layers, MoE layers, norm and head.

Layers of one kind are stacked (parameters have a leading axis of layers) and runs of them are
scanned, so that tracing does not grow with depth. A layer takes the activations of all
microbatches, and issues its blocks in the order the schedule says. Attention is latent or
grouped-query, as the config says.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.layers.cache import LayerCache, ModelCache
from cmjax.models.moe.layers.experts import SwiGLU
from cmjax.models.moe.layers.gqa import GQA
from cmjax.models.moe.layers.initial import normal
from cmjax.models.moe.layers.linear import Linear
from cmjax.models.moe.layers.mla import MLA
from cmjax.models.moe.layers.moe import MoE, moe_stages
from cmjax.models.moe.layers.norm import RMSNorm
from cmjax.models.moe.layers.rope import check_length
from cmjax.models.moe.parallelism import Parallelism

Activations = tuple[Float[Array, "sequences length hidden"], ...]
Caches = tuple[LayerCache, ...]
Attended = Callable[[], tuple[Array, LayerCache]]
# attend(attention, microbatch, x, cache): how a layer's attention is to be run. It begins, and
# gives back how to go on, for its result and the cache.
Attend = Callable[[MLA | GQA, int, Array, Any], Attended]
_unrolled: contextvars.ContextVar[bool] = contextvars.ContextVar("unrolled", default=False)


def unrolled_layers() -> contextlib.AbstractContextManager[None]:
    """A context in which layers are traced one by one instead of as a loop."""
    return _unrolling()


@contextlib.contextmanager
def _unrolling() -> Iterator[None]:
    token = _unrolled.set(True)
    try:
        yield
    finally:
        _unrolled.reset(token)


class DenseLayer(nnx.Module):
    """Attention and a dense feed-forward block."""

    def __init__(
        self, config: MoEConfig, parallelism: Parallelism, *, arithmetic: Arithmetic, rngs: nnx.Rngs
    ):
        self.parallelism = parallelism
        whole = dataclasses.replace(parallelism, all_reduces=True)
        # latent attention projects its part of the tokens down before it gathers
        latent = isinstance(config.attention, LatentAttention)
        attending = parallelism if latent else whole
        self.attention = _attention(config, attending, arithmetic=arithmetic, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, rngs=rngs)
        self.ffn = SwiGLU(
            config.hidden_size,
            config.ffn_size,
            whole,
            format=arithmetic.dense,
            rngs=rngs,
            bias=config.ffn_bias,
        )

    def __call__(self, xs: Activations, caches: Any, attend: Attend) -> tuple[Activations, Caches]:
        out, new = [], []
        for number, (x, cache) in enumerate(zip(xs, caches, strict=True)):
            with self.parallelism.schedule.block("attention"):
                y, written = attend(self.attention, number, x, cache)()
                x = x + y
            with self.parallelism.schedule.block("experts", scope="dense_ffn"):
                x = x + self.ffn(self.norm(x))
            out.append(x)
            new.append(written)
        return tuple(out), tuple(new)


class MoELayer(nnx.Module):
    """Attention and a mixture of experts."""

    def __init__(
        self, config: MoEConfig, parallelism: Parallelism, *, arithmetic: Arithmetic, rngs: nnx.Rngs
    ):
        self.parallelism = parallelism
        self.attention = _attention(config, parallelism, arithmetic=arithmetic, rngs=rngs)
        self.moe = MoE(config, parallelism, arithmetic=arithmetic, rngs=rngs)

    def __call__(self, xs: Activations, caches: Any, attend: Attend) -> tuple[Activations, Caches]:
        stages = [
            self._stages(number, x, cache, attend)
            for number, (x, cache) in enumerate(zip(xs, caches, strict=True))
        ]
        out, new = zip(*self.parallelism.schedule.issue(stages), strict=True)
        return out, new

    def _stages(
        self, number: int, x: Array, cache: Any, attend: Attend
    ) -> Generator[None, None, tuple[Array, LayerCache]]:
        """A microbatch through the layer, in the stages of `Schedule.issue`."""
        block = self.parallelism.schedule.block
        with block("attention"), self.parallelism.schedule.head_start(number):
            attended = attend(self.attention, number, x, cache)
        yield
        with block("attention"):
            y, written = attended()
            x = x + y
        with block("router"):
            tokens = x.reshape(-1, x.shape[-1])
            routed = self.moe.route(tokens)
        yield
        y = yield from moe_stages(self.moe, tokens, routed)
        return y.reshape(x.shape), written


class Stack(nnx.Module):
    """All `count` layers of one kind; runs of them are scanned."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], count: int, *, rngs: nnx.Rngs):
        # every stream of the Rngs is split, so that layers differ
        self.layers = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))

    def __call__(
        self, xs: Activations, caches: Any, attend: Attend, part: slice = slice(None)
    ) -> tuple[Activations, Caches]:
        """Run the layers of `part` (all). `caches`: per microbatch, stacked over these layers, or
        `None` in prefill. A true part of the layers is copied out of the stack first."""
        graph, state = nnx.split(self.layers)
        state = _layers(state, part)

        def one_layer(xs, layer):
            state, caches = layer
            return nnx.merge(graph, state)(xs, caches, attend)

        return lax.scan(one_layer, xs, (state, caches), unroll=_unrolled.get() or 1)


class Transformer(nnx.Module):
    """The decoder, as one rank holds it.

    Attributes: `dense` and `moe` stacks (None without such layers), `embed [vocab, hidden]`,
    `norm`, `head` (None if it is the embedding). The embedding is in the dtype of the activations.
    The vocabulary is split over the ranks of a tensor-parallel group.
    """

    def __init__(
        self, config: MoEConfig, parallelism: Parallelism, *, arithmetic: Arithmetic, rngs: nnx.Rngs
    ):
        self.config, self.parallelism = config, parallelism
        dtype = arithmetic.dtype
        vocabulary = parallelism.vocabulary(config)
        shape = (vocabulary, config.hidden_size)
        self.embed = nnx.Param(normal(rngs.params(), shape).astype(dtype))

        def dense(rngs: nnx.Rngs) -> DenseLayer:
            return DenseLayer(config, parallelism, arithmetic=arithmetic, rngs=rngs)

        def moe(rngs: nnx.Rngs) -> MoELayer:
            return MoELayer(config, parallelism, arithmetic=arithmetic, rngs=rngs)

        count = len(config.dense_layers)
        self.dense = Stack(dense, count, rngs=rngs) if count else None
        count = config.moe_layers
        self.moe = Stack(moe, count, rngs=rngs) if count else None
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, rngs=rngs)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(config.hidden_size, vocabulary, format=arithmetic.head, rngs=rngs)
        )

    def prefill(
        self, tokens: tuple[Int[Array, "sequences prompt"], ...], kv_cache: KVCache
    ) -> tuple[Activations, tuple[ModelCache, ...]]:
        """Final normalised hidden states and caches of whole prompts, per microbatch."""
        check_length(self.config, tokens[0].shape[1])
        none = (ModelCache(None, None),) * len(tokens)
        return self._run(tokens, none, prefill_attention(kv_cache))

    def decode(
        self,
        tokens: tuple[Int[Array, "requests new"], ...],
        caches: tuple[ModelCache, ...],
        lengths: tuple[Int[Array, "requests"], ...],
    ) -> tuple[Activations, tuple[ModelCache, ...]]:
        """Final normalised hidden states of new tokens; caches with them written at `lengths`."""
        check_length(self.config, jax.tree.leaves(caches)[0].shape[2])
        return self._run(tokens, caches, decode_attention(lengths, self.parallelism))

    def logits(self, hidden: Float[Array, "own *batch hidden"]) -> Float[Array, "own *batch vocab"]:
        """Scores over the vocabulary, float32."""
        with jax.named_scope("lm_head"):
            hidden = self.parallelism.gather(hidden)
            if self.head is None:
                # XLA's product reads the embedding as it lies: its transpose is never made
                scores = jnp.matmul(hidden, self.embed[...].T)
            else:
                scores = self.head(hidden)
            # a rank samples for its own requests
            scores = self.parallelism.own_rows(scores)[..., : self.config.vocab_size]
            return scores.astype(jnp.float32)

    def embedding(self, tokens: Int[Array, "own *batch"]) -> Float[Array, "own *batch hidden"]:
        """Embedded tokens."""
        parallelism = self.parallelism
        with jax.named_scope("embed"):
            tokens = parallelism.gather(tokens)
            if parallelism.tensor == 1:
                return jnp.take(self.embed[...], tokens, axis=0, mode="clip")
            held = parallelism.vocabulary(self.config)
            place = tokens - parallelism.group_rank * held
            found = jnp.take(self.embed[...], place, axis=0, mode="clip")
            here = (place >= 0) & (place < held)
            return parallelism.scatter(jnp.where(here[..., None], found, 0))

    def _run(self, tokens, caches, attend):
        xs = tuple(self.embedding(t) for t in tokens)
        written = {"dense": [], "moe": []}
        for kind, layers in self.config.runs:
            stack = self.dense if kind == "dense" else self.moe
            assert stack is not None, "the config that has such layers made the stack"
            part = slice(layers.start, layers.stop)
            old = tuple(_layers(getattr(cache, kind), part) for cache in caches)
            xs, new = stack(xs, old, attend, part)
            written[kind].append(new)
        dense, moe = (_joined(written[kind], len(tokens)) for kind in ("dense", "moe"))
        new = tuple(
            ModelCache(d, m, cache.mtp) for d, m, cache in zip(dense, moe, caches, strict=True)
        )
        return tuple(self.norm(x) for x in xs), new


def prefill_attention(kv_cache: KVCache) -> Attend:
    """Attend the prompt itself, and hand out its cache entries."""
    return lambda attention, number, x, cache: lambda: attention.prefill(x, kv_cache)


def decode_attention(
    lengths: tuple[Int[Array, "requests"], ...], parallelism: Parallelism
) -> Attend:
    """Attend the cache, microbatch `number` at its `lengths`, those of a rank's own requests."""
    group = tuple(parallelism.gather(each) for each in lengths)

    def attend(attention, number, x, cache):
        assert cache is not None, "decoding needs a cache"
        return attention.begin_decode(x, cache, group[number])

    return attend


def _attention(config: MoEConfig, parallelism: Parallelism, **options: Any) -> MLA | GQA:
    """The attention block the config asks for."""
    latent = isinstance(config.attention, LatentAttention)
    return (MLA if latent else GQA)(config, parallelism, **options)


def _layers(tree: Any, part: slice) -> Any:
    """Some layers of a stack; the tree itself if these are all."""
    leaves = jax.tree.leaves(tree)
    if not leaves or range(leaves[0].shape[0])[part] == range(leaves[0].shape[0]):
        return tree
    return jax.tree.map(lambda x: x[part], tree)


def _joined(runs: list[Caches], microbatches: int) -> tuple[LayerCache | None, ...]:
    """Per microbatch, the caches of a kind's layers, from those of its runs."""
    if not runs:
        return (None,) * microbatches
    if len(runs) == 1:
        return runs[0]
    return tuple(
        jax.tree.map(lambda *parts: jnp.concatenate(parts), *each)
        for each in zip(*runs, strict=True)
    )
