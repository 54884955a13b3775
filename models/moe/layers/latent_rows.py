"""What lies between the products of latent attention's decode prolog, as two calls on a CPU.

Norms, rotations, entries of the cache and the rows of heads are two dozen kernels of XLA's a layer
that compute next to nothing each. The stages, which other platforms run and which are priced, are
one fused kernel of the NPU, products included (`cmjax.models.moe.layers.mla`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from cmjax import native
from cmjax.models.moe.arithmetic import KVCache
from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.layers.cache import LatentCache
from cmjax.models.moe.layers.few import is_few
from cmjax.models.moe.layers.norm import rms_norm
from cmjax.models.moe.layers.rope import angles, rotate
from cmjax.primitives.define import define_call

LATENT_NORM_EPS = 1e-6
"""DeepSeek's own code and transformers build the norms of latents without the config's epsilon."""


def latent_entries(
    config: MoEConfig,
    query: Float[Array, "requests new q_rank"] | None,
    columns: Float[Array, "requests new columns"],
    positions: Int[Array, "requests new"],
    gains: tuple[Float32[Array, "q_rank"] | None, Float32[Array, "rank"]],
    kind: KVCache,
) -> tuple[Float[Array, "requests new q_rank"] | None, LatentCache]:
    """The normalised latent of queries, and the cache's entries of these tokens, as one call.

    Args:
      query: of the queries' down-projection; `None` where there is none.
      columns: of the down-projection of keys and values: their latent, then the shared key.
      gains: of the two norms.
      kind: format of the entries: int8, or that of `columns`.
    """
    low = jnp.zeros((*columns.shape[:2], 0), columns.dtype) if query is None else query
    gain = jnp.zeros((0,), jnp.float32) if gains[0] is None else gains[0]
    params = {"config": config, "kind": kind}
    operands = low, columns, positions, gain, gains[1]
    low, *entries = latent_entries_p.bind(*operands, **params)
    latent, scale, rope = entries if kind == "int8" else (entries[0], None, entries[1])
    return None if query is None else low, LatentCache(latent, scale, rope)


def latent_heads(
    config: MoEConfig,
    columns: Float[Array, "requests new columns"],
    positions: Int[Array, "requests new"],
) -> tuple[Float[Array, "heads requests new nope"], Float[Array, "requests new heads rope"]]:
    """Queries without positions, by head, and rotated ones, as one call."""
    plain, turned = latent_heads_p.bind(columns, positions, config=config)
    return plain, turned


def is_one_call(x: Array, kind: KVCache) -> bool:
    """Whether the kernels read these rows and give such entries."""
    return is_few(x) and kind in ("int8", x.dtype.name)


def _sizes(config: MoEConfig) -> LatentAttention:
    assert isinstance(config.attention, LatentAttention), "the caller chooses by this type"
    return config.attention


def _entries(query, columns, positions, query_gain, gain, *, config, kind):
    low = rms_norm(query, query_gain, LATENT_NORM_EPS) if query.shape[-1] else query
    latent, rope = jnp.split(columns, [_sizes(config).kv_lora_rank], axis=-1)
    rope = rotate(rope, *angles(positions, config), interleave=config.rope.interleave)
    entries = LatentCache.of(rms_norm(latent, gain, LATENT_NORM_EPS), rope, kind)
    return [low, *jax.tree.leaves(entries)]


def _native_entries(query, columns, positions, query_gain, gain, *, config, kind):
    rows, sizes = columns.shape[:2], _sizes(config)
    tokens, stepped = rows[0] * rows[1], kind == "int8"
    turn = angles(positions.reshape(tokens), config)
    low, latent, step, rope = native.call(
        "cmjax_latent_entries",
        [
            jax.ShapeDtypeStruct((tokens, query.shape[-1]), query.dtype),
            jax.ShapeDtypeStruct((tokens, sizes.kv_lora_rank), kind),
            jax.ShapeDtypeStruct((tokens if stepped else 0,), jnp.float32),
            jax.ShapeDtypeStruct((tokens, sizes.qk_rope_dim), jnp.bfloat16 if stepped else kind),
        ],
        query.reshape(tokens, -1) if query.shape[-1] else jnp.zeros((tokens, 0), query.dtype),
        columns.reshape(tokens, -1),
        *turn,
        query_gain.astype(jnp.float32),
        gain.astype(jnp.float32),
        eps=np.float32(LATENT_NORM_EPS),
        interleaved=np.bool_(config.rope.interleave),
    )
    found = [low, latent, *([step] if stepped else []), rope]
    return [x.reshape(*rows, *x.shape[1:]) for x in found]


def _heads(columns, positions, *, config):
    sizes = _sizes(config)
    each = columns.reshape(*columns.shape[:2], -1, sizes.qk_dim)
    plain, turned = jnp.split(each, [sizes.qk_nope_dim], axis=-1)
    turn = angles(positions[..., None], config)  # alike for all heads
    turned = rotate(turned, *turn, interleave=config.rope.interleave)
    return [jnp.moveaxis(plain, 2, 0), turned]


def _native_heads(columns, positions, *, config):
    rows, sizes = columns.shape[:2], _sizes(config)
    tokens, heads = rows[0] * rows[1], columns.shape[-1] // sizes.qk_dim
    plain, turned = native.call(
        "cmjax_latent_heads",
        [
            jax.ShapeDtypeStruct((heads, tokens, sizes.qk_nope_dim), columns.dtype),
            jax.ShapeDtypeStruct((tokens, heads, sizes.qk_rope_dim), columns.dtype),
        ],
        columns.reshape(tokens, -1),
        *angles(positions.reshape(tokens), config),
        interleaved=np.bool_(config.rope.interleave),
    )
    return [plain.reshape(heads, *rows, -1), turned.reshape(*rows, heads, -1)]


latent_entries_p = define_call("cm_latent_entries", _entries, _native_entries)
latent_heads_p = define_call("cm_latent_heads", _heads, _native_heads)
