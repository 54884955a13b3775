"""From the columns of a grouped-query projection to rotated queries and the cache's new entries.

Of the few tokens of a decode step this is one call on a CPU; of XLA's it is two dozen kernels that
compute next to nothing each.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from cmjax import native
from cmjax.models.moe.arithmetic import KVCache
from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.models.moe.layers.cache import GroupedCache
from cmjax.models.moe.layers.few import is_few
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
        return *rotated(q, k, positions), v

    @fused("RotaryEmbedding")
    def rotated(q, k, positions):
        cos, sin = angles(positions[..., None], config)  # alike for all heads
        return tuple(rotate(y, cos, sin, interleave=config.rope.interleave) for y in (q, k))

    return kernel


def cached_heads(
    config: MoEConfig,
    tensor: int,
    qkv: Float[Array, "requests new columns"],
    positions: Int[Array, "requests new"],
    norms: tuple[Float32[Array, "head_dim"], ...],
    kind: KVCache,
) -> tuple[Float[Array, "requests new heads head_dim"], GroupedCache]:
    """Queries, and the cache's entries of these tokens, as one call.

    Args:
      norms: gains of queries and keys, or none.
      kind: format of the entries: int8, or that of `qkv`.
    """
    params = {"config": config, "tensor": tensor, "kind": kind}
    q, *entries = rotary_heads_p.bind(qkv, positions, *norms, **params)
    return q, GroupedCache(*entries, *(None,) * (4 - len(entries)))


def is_one_call(qkv: Array, kind: KVCache) -> bool:
    """Whether the kernel reads these columns and gives such entries."""
    return is_few(qkv) and kind in ("int8", qkv.dtype.name)


def _reference(qkv, positions, *norms, config, tensor, kind):
    q, k, v = rotary_heads(config, tensor)(qkv, positions, *(norms or (None, None)))
    return [q, *jax.tree.leaves(GroupedCache.of(k, v, kind))]


def _native(qkv, positions, *norms, config, tensor, kind):
    sizes, rows = config.attention, qkv.shape[:2]
    heads, kv_heads, dim = config.heads // tensor, sizes.kv_heads_of(tensor), sizes.head_dim
    entry = jax.ShapeDtypeStruct((*rows, kv_heads, dim), kind)
    stepped = (*rows, kv_heads) if kind == "int8" else (0,)
    none = jnp.zeros((0,), jnp.float32)
    found = native.call(
        "cmjax_rotary_heads",
        [
            jax.ShapeDtypeStruct((*rows, heads, dim), qkv.dtype),
            *[entry] * 2,
            *[jax.ShapeDtypeStruct(stepped, jnp.float32)] * 2,
        ],
        qkv,
        *angles(positions, config),
        *(norms or (none, none)),
        eps=np.float32(config.norm_eps),
        interleaved=np.bool_(config.rope.interleave),
    )
    return found if kind == "int8" else found[:3]


rotary_heads_p = define_call("cm_rotary_heads", _reference, _native)
