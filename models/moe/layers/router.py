"""Which experts a token visits: group-limited top-k over sigmoid or softmax scores.

    s = sigmoid(x W) or softmax(x W);  choose the top-k of s + b within the groups whose best s + b
    add up highest;  weights = s of the chosen (/ their sum) * routed_scale

DeepSeek-V3 (report, sections 2.1.2 and 2.1.3) takes the sigmoid, the two best of a group and a
correction bias `b`, which balances load: it chooses experts and never enters the weights; GLM-4.5
does likewise.
DeepSeek-V2 (section 2.2) takes the softmax and the best of a group; Qwen3-MoE and Mixtral the
softmax and no groups.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layers.initial import normal
from cmjax.models.moe.slots import choose_slots
from cmjax.program.mark import fused


def gate(
    logits: Float32[Array, "tokens experts"],
    bias: Float32[Array, "experts"] | None,
    config: MoEConfig,
) -> tuple[Int32[Array, "tokens k"], Float32[Array, "tokens k"]]:
    """Chosen experts, best first, and their weights."""
    scores = jax.nn.sigmoid(logits) if config.scoring == "sigmoid" else jax.nn.softmax(logits)
    groups, group_size = config.expert_groups, scores.shape[1] // config.expert_groups
    biased = scores if bias is None else scores + bias
    biased = biased.reshape(scores.shape[0], groups, group_size)
    best, _ = lax.top_k(biased, min(config.group_best, group_size))
    _, kept = lax.top_k(jnp.sum(best, axis=-1), config.groups_per_token)
    allowed = jnp.any(kept[:, :, None] == jnp.arange(groups), axis=1)
    candidates = jnp.where(allowed[:, :, None], biased, -jnp.inf).reshape(scores.shape)
    _, chosen = lax.top_k(candidates, config.experts_per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.normalize_weights:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    if bias is not None:
        weights = _with_load(weights, bias, chosen)
    return chosen.astype(jnp.int32), weights * config.routed_scale


@jax.custom_vjp
def _with_load(weights, bias, chosen):
    """`weights`. The bias chooses experts, so its derivative is zero almost everywhere; here it is
    defined to be the load, rows per expert: what DeepSeek-V3's balancing rule steps against."""
    del bias, chosen
    return weights


def _with_load_forward(weights, bias, chosen):
    return weights, (bias, chosen)


def _with_load_backward(residuals, cotangent):
    bias, chosen = residuals
    return cotangent, jnp.zeros_like(bias).at[chosen.reshape(-1)].add(1), None


_with_load.defvjp(_with_load_forward, _with_load_backward)


@fused("Gate")
def _scores(x, weight):
    return jnp.matmul(x.astype(jnp.float32), weight)


class Router(nnx.Module):
    """Routing to physical slots.

    Scores are float32 whatever the model's precision: a wrong expert is a large error.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.routed_experts)
        weight = normal(rngs.params(), shape)
        self.weight = nnx.Param(weight * config.hidden_size**-0.5)
        biased = config.score_bias
        self.bias = nnx.Param(jnp.zeros((config.routed_experts,), jnp.float32)) if biased else None
        self.config = config

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        rank: Int32[Array, ""],
        slots_of_expert: Int32[Array, "experts copies"],
        copies: Int32[Array, "experts"],
    ) -> tuple[Int32[Array, "tokens k"], Float32[Array, "tokens k"]]:
        """Slots each token goes to, and their weights.

        Where the table has a row for the shared expert (one more than there are routed experts),
        every token gets one more copy, to a replica of it, with weight 1.
        """
        bias = None if self.bias is None else self.bias[...]
        return routed(self.config, x, self.weight[...], bias, rank, slots_of_expert, copies)


def routed(config: MoEConfig, x, weight, bias, rank, slots_of_expert, copies):
    """`Router` of these parameters."""
    return _gating(config)(_scores(x, weight), bias, rank, slots_of_expert, copies)


@functools.cache
def _gating(config: MoEConfig) -> Callable:
    @fused("GatingTopK")
    def kernel(logits, bias, rank, slots_of_expert, copies):
        chosen, weights = gate(logits, bias, config)
        if slots_of_expert.shape[0] > config.routed_experts:
            shared = jnp.full_like(chosen[:, :1], config.routed_experts)
            chosen = jnp.concatenate([chosen, shared], axis=1)
            weights = jnp.concatenate([weights, jnp.ones_like(weights[:, :1])], axis=1)
        return choose_slots(chosen, rank, slots_of_expert, copies), weights

    return kernel
