"""What a rank computes of a mixture of experts in training: the same to price and to run.

    embed(params, tokens)  ->  x,    layer(params, x) of every layer,    loss(params, x, tokens)

`recompute=selective` computes attention again in the backward pass, `full` the whole layer, its
exchanges too. Parameters are those of `cmjax.models.moe.layers.transformer.Transformer`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.config import LayerKind, MoEConfig
from cmjax.models.moe.layers.linear import Linear
from cmjax.models.moe.layers.norm import RMSNorm
from cmjax.models.moe.layers.transformer import DenseLayer, MoELayer, prefill_attention
from cmjax.models.moe.parallelism import Parallelism
from cmjax.parallelism.plan import Recompute

Tree = Any
_KINDS = {"moe": MoELayer, "dense": DenseLayer}


class LayerProgram:
    """A layer of one kind on one rank.

    Attributes:
      shapes: of its parameters, a nested dict; integers are tables of slots.
    """

    def __init__(
        self,
        model: MoEConfig,
        parallelism: Parallelism,
        kind: LayerKind,
        recompute: Recompute,
        arithmetic: Arithmetic,
    ):
        made = nnx.eval_shape(
            lambda: _KINDS[kind](model, parallelism, arithmetic=arithmetic, rngs=nnx.Rngs(params=0))
        )
        self._graph, state = nnx.split(made)
        self.shapes: Tree = nnx.to_pure_dict(state)
        self._recompute = recompute
        self._prompt = prefill_attention(arithmetic.kv_cache)

    def __call__(
        self, params: Tree, x: Float[Array, "sequences length hidden"]
    ) -> Float[Array, "sequences length hidden"]:
        """The residual stream behind the layer."""
        run = jax.checkpoint(self._run) if self._recompute == "full" else self._run
        return run(params, x)

    def _run(self, params, x):
        (y,), _ = nnx.merge(self._graph, params)((x,), (None,), self._attend)
        return y

    def _attend(self, attention, number, x, cache):
        def run(x):
            return self._prompt(attention, number, x, cache)()

        return partial(jax.checkpoint(run) if self._recompute == "selective" else run, x)


class EndsProgram:
    """Embedding, and final norm, head and loss, on one rank."""

    def __init__(self, model: MoEConfig, arithmetic: Arithmetic):
        class Ends(nnx.Module):
            def __init__(self, rngs: nnx.Rngs):
                shape = model.vocab_size, model.hidden_size
                self.embed = nnx.Param(jnp.zeros(shape, arithmetic.dtype))
                self.norm = RMSNorm(model.hidden_size, model.norm_eps, rngs=rngs)
                tied = model.tie_embeddings
                head = None if tied else Linear(*shape[::-1], format=arithmetic.head, rngs=rngs)
                self.head = head

        self._graph, state = nnx.split(nnx.eval_shape(lambda: Ends(nnx.Rngs(params=0))))
        self.shapes: Tree = nnx.to_pure_dict(state)

    def embed(
        self, params: Tree, tokens: Int[Array, "sequences length"]
    ) -> Float[Array, "sequences length hidden"]:
        """The residual stream before the first layer."""
        return jnp.take(params["embed"], tokens, axis=0, mode="clip")

    def loss(
        self,
        params: Tree,
        x: Float[Array, "sequences length hidden"],
        tokens: Int[Array, "sequences length"],
    ) -> Float[Array, ""]:
        """Mean cross-entropy of `tokens`, which follow those of `x`, in nats."""
        ends = nnx.merge(self._graph, params)
        x = ends.norm(x)
        logits = x @ ends.embed[...].T if ends.head is None else ends.head(x)
        logits = logits.astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))


def of_experts(path: tuple) -> bool:
    """Whether a leaf is of routed experts, of which every rank has others."""
    return any(getattr(key, "key", None) == "experts" for key in path)
