"""Multi-token prediction (DeepSeek-V3 report, section 2.2): one more layer that drafts a token.

    h' = Layer(W_eh [norm(embed(t_{i+1})); norm(h_i)]),     draft of t_{i+2} = head(norm(h'))

`h_i` is the main model's hidden state after its final norm (as vLLM and SGLang serve it), or a
previous draft's. Embedding and head are the main model's.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layers.linear import Linear
from cmjax.models.moe.layers.norm import RMSNorm
from cmjax.models.moe.layers.transformer import Activations, Attend, MoELayer, Stack, Transformer
from cmjax.models.moe.parallelism import Parallelism


class MTPHead(nnx.Module):
    """The MTP module of one rank."""

    def __init__(
        self, config: MoEConfig, parallelism: Parallelism, *, arithmetic: Arithmetic, rngs: nnx.Rngs
    ):
        hidden = config.hidden_size
        self.norm_embed = RMSNorm(hidden, config.norm_eps, rngs=rngs)
        self.norm_hidden = RMSNorm(hidden, config.norm_eps, rngs=rngs)
        self.project = Linear(2 * hidden, hidden, format=arithmetic.projections, rngs=rngs)
        self.stack = Stack(
            lambda rngs: MoELayer(config, parallelism, arithmetic=arithmetic, rngs=rngs),
            1,
            rngs=rngs,
        )
        self.norm = RMSNorm(hidden, config.norm_eps, rngs=rngs)

    def __call__(
        self,
        main: Transformer,
        hidden: Activations,
        following: tuple[Int[Array, "sequences length"], ...],
        caches,
        attend: Attend,
    ):
        """Hidden states that draft the token after `following`, and the layer's caches.

        Args:
          main: whose embedding is shared.
          hidden: per microbatch, `h_i`.
          following: per microbatch, `t_{i+1}`.
          caches: per microbatch, the MTP layer's cache (`None` in prefill).
          attend: as for the main model.
        """
        xs = []
        for h, tokens in zip(hidden, following, strict=True):
            both = (self.norm_embed(main.embedding(tokens)), self.norm_hidden(h))
            xs.append(self.project(jnp.concatenate(both, axis=-1)))
        xs, caches = self.stack(tuple(xs), tuple(caches), attend)
        return tuple(self.norm(x) for x in xs), caches


def draft(main: Transformer, hidden: Float[Array, "sequences hidden"]) -> Int[Array, "sequences"]:
    """The token the MTP module's hidden state proposes (greedy)."""
    with jax.named_scope("sample"):
        return jnp.argmax(main.logits(hidden), axis=-1).astype(jnp.int32)
