"""From the columns of a grouped-query projection to rotated queries and the cache's new entries.

Of the few tokens of a decode step this is one call on a CPU, which writes the entries where they
belong; of XLA's it is two dozen kernels that compute next to nothing each.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from cmjax import native
from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.models.moe.layers.cache import GroupedCache
from cmjax.models.moe.layers.norm import rms_norm
from cmjax.models.moe.layers.rope import angles, rotate
from cmjax.primitives.define import define_call
from cmjax.program.mark import fused


@functools.cache
def rotary_heads(config: MoEConfig, tensor: int) -> Callable:
    """From the projection's columns to rotated queries and keys, and values, per head."""
    sizes = config.attention
    assert isinstance(sizes, GroupedAttention)
    heads = config.heads // tensor
    splits = (heads, heads + sizes.kv_heads_of(tensor))

    @fused("RotaryHeads")
    def kernel(qkv, positions, q_norm, k_norm):
        each = qkv.reshape(*qkv.shape[:-1], -1, sizes.head_dim)
        q, k, v = jnp.split(each, splits, axis=-2)
        if q_norm is not None:
            q = rms_norm(q, q_norm, config.norm_eps)
            k = rms_norm(k, k_norm, config.norm_eps)
        cos, sin = angles(positions[..., None], config)  # alike for all heads
        q, k = (rotate(y, cos, sin, interleave=config.rope.interleave) for y in (q, k))
        return q, k, v

    return kernel


def cached_heads(
    config: MoEConfig,
    tensor: int,
    qkv: Float[Array, "requests new columns"],
    positions: Int[Array, "requests new"],
    norms: tuple[Float32[Array, "head_dim"], ...],
    cache: GroupedCache,
) -> tuple[Float[Array, "requests new heads head_dim"], GroupedCache]:
    """Queries, and the cache with keys and values written at `positions`, as one call.

    Args:
      norms: gains of queries and keys, or none.
    """
    entries, tree = jax.tree.flatten(cache)
    operands = (qkv, positions, *norms, *entries)
    params = {"config": config, "tensor": tensor, "norms": len(norms), "tree": tree}
    q, *entries = cached_heads_p.bind(*operands, **params)
    return q, jax.tree.unflatten(tree, entries)


def is_one_call(qkv: Array, cache: GroupedCache) -> bool:
    """Whether the kernel reads these columns and writes this cache."""
    floats = qkv.dtype in (jnp.float32, jnp.bfloat16)
    return floats and cache.kind in ("int8", qkv.dtype.name)


def _reference(qkv, positions, *rest, config, tensor, norms, tree):
    gains = rest[:norms] or (None, None)
    cache = jax.tree.unflatten(tree, rest[norms:])
    q, k, v = rotary_heads(config, tensor)(qkv, positions, *gains)
    return [q, *jax.tree.leaves(cache.write(k, v, positions))]


def _native(qkv, positions, *rest, config, tensor, norms, tree):
    cache: GroupedCache = jax.tree.unflatten(tree, rest[norms:])
    if not is_one_call(qkv, cache) or min(*qkv.shape, *cache.key.shape) == 0:
        params: dict[str, Any] = {"config": config, "tensor": tensor, "norms": norms, "tree": tree}
        return _reference(qkv, positions, *rest, **params)
    none = jnp.zeros((0,), jnp.float32)
    gains = rest[:norms] or (none, none)
    steps = [none if x is None else x for x in (cache.key_scale, cache.value_scale)]
    entries = [cache.key, cache.value, *steps]
    heads = qkv.shape[-1] // config.attention.head_dim - 2 * cache.key.shape[2]
    q = jax.ShapeDtypeStruct((*qkv.shape[:2], heads, cache.key.shape[3]), qkv.dtype)
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in entries]
    found = native.call(
        "cmjax_cached_heads",
        [q, *like],
        qkv,
        positions,
        *angles(positions, config),
        *gains,
        *entries,
        aliases={6 + i: 1 + i for i in range(4)},
        eps=np.float32(config.norm_eps),
        interleaved=np.bool_(config.rope.interleave),
    )
    return found[: 1 + len(jax.tree.leaves(cache))]


cached_heads_p = define_call("cm_cached_heads", _reference, _native)
