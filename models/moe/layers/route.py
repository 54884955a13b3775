"""The norm before the experts and the router as one call: of the few tokens of a decode step, on a
CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from cmjax import native
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layers.few import is_few
from cmjax.models.moe.layers.norm import rms_norm
from cmjax.models.moe.layers.router import routed
from cmjax.primitives.define import define_call

_MOST_SCORES = 1 << 19  # weights of a router that are not worth a second thread


def route(
    config: MoEConfig,
    x: Float[Array, "tokens hidden"],
    gain: Float32[Array, "hidden"],
    weight: Float32[Array, "hidden routed"],
    bias: Float32[Array, "routed"] | None,
    rank: Int32[Array, ""],
    slots_of_expert: Int32[Array, "experts_and_shared copies"],
    copies: Int32[Array, "experts_and_shared"],
) -> tuple[Array, Int32[Array, "tokens k"], Float32[Array, "tokens k"]]:
    """Normalised tokens, the slots that each goes to, and their weights: see `Router`."""
    operands = x, gain, weight, rank, slots_of_expert, copies
    x, slots, weights = route_p.bind(*operands, *([] if bias is None else [bias]), config=config)
    return x, slots, weights


def is_one_call(x: Array, weight: Array) -> bool:
    """Whether a CPU has one call for these tokens."""
    return is_few(x) and weight.dtype == jnp.float32 and weight.size <= _MOST_SCORES


def _reference(x, gain, weight, rank, slots_of_expert, copies, *bias, config):
    x = rms_norm(x, gain, config.norm_eps)
    bias = bias[0] if bias else None
    return [x, *routed(config, x, weight, bias, rank, slots_of_expert, copies)]


def _native(x, gain, weight, rank, slots_of_expert, copies, *bias, config):
    shared = slots_of_expert.shape[0] > config.routed_experts
    chosen = x.shape[0], config.experts_per_token + shared
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    results = [like, *(jax.ShapeDtypeStruct(chosen, t) for t in (jnp.int32, jnp.float32))]
    call = functools.partial(native.call, "cmjax_route", results)
    return call(
        x,
        gain,
        weight,
        bias[0] if bias else jnp.zeros((0,), jnp.float32),
        rank.reshape(1),
        slots_of_expert,
        copies,
        eps=np.float32(config.norm_eps),
        groups=np.int64(config.expert_groups),
        kept=np.int64(config.groups_per_token),
        best=np.int64(config.group_best),
        chosen=np.int64(config.experts_per_token),
        sigmoid=np.bool_(config.scoring == "sigmoid"),
        normalizes=np.bool_(config.normalize_weights),
        scale=np.float32(config.routed_scale),
    )


route_p = define_call("cm_route", _reference, _native)
