"""Group-limited sigmoid routing (DeepSeek-V3 report, sections 2.1.2 and 2.1.3).

    s = sigmoid(x W);  choose the top-k of s + b within the groups whose two best s + b add up
    highest;  weights = s of the chosen / their sum * routed_scale

The correction bias `b` balances load; it chooses experts and never enters the weights.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from cmjax.program.mark import fused
from models.moe.config import MoEConfig


def gate(
    logits: Float32[Array, "tokens experts"], bias: Float32[Array, "experts"], config: MoEConfig
) -> tuple[Int32[Array, "tokens k"], Float32[Array, "tokens k"]]:
    """Chosen experts, best first, and their weights."""
    scores = jax.nn.sigmoid(logits)
    tokens, experts = scores.shape
    groups = config.expert_groups
    biased = (scores + bias).reshape(tokens, groups, experts // groups)
    best, _ = lax.top_k(biased, min(2, experts // groups))
    _, kept = lax.top_k(jnp.sum(best, axis=-1), config.groups_per_token)
    allowed = jnp.any(kept[:, :, None] == jnp.arange(groups), axis=1)
    candidates = jnp.where(allowed[:, :, None], biased, -jnp.inf).reshape(tokens, experts)
    _, chosen = lax.top_k(candidates, config.experts_per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.normalize_weights:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return chosen.astype(jnp.int32), weights * config.routed_scale


@fused("Gate")
def _scores(x, weight):
    return jnp.matmul(x.astype(jnp.float32), weight)


class Router(nnx.Module):
    """Scores in float32 whatever the model's precision: a wrong expert is a large error."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.experts)
        weight = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.weight = nnx.Param(weight * config.hidden_size**-0.5)
        self.bias = nnx.Param(jnp.zeros((config.experts,), jnp.float32))
        self.config = config

    def __call__(
        self, x: Float[Array, "tokens hidden"]
    ) -> tuple[Int32[Array, "tokens k"], Float32[Array, "tokens k"]]:
        """Chosen experts and their weights."""
        logits = _scores(x, self.weight[...])
        kernel = fused("GatingTopK")(lambda scores, bias: gate(scores, bias, self.config))
        return kernel(logits, self.bias[...])
