"""Key/value caches of the two forms of attention.

Per token and layer, latent attention holds the normalised latent (`kv_lora_rank` values) and the
rotated shared key (`qk_rope_dim` values); grouped-query attention holds rotated keys and values of
every key/value head. INT8 has one scale per token (and head), MXFP4 an exponent per 32 channels,
two values to a byte; the rotated shared key stays BF16 with both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax.models.moe.arithmetic import KV_CACHES, KVCache
from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.primitives.attention.cached import dequantized
from cmjax.primitives.exchange import quantize_rows
from cmjax.primitives.msd import QuantizedWeight, dequantize_weight, quantize_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Cache of one layer, or of a stack of layers with a leading axis."""

    latent: Array  # [requests, max_len, kv_lora_rank], int8 if scale is given; MXFP4: half as wide
    scale: Array | None  # [requests, max_len] float32; MXFP4: uint8 [.., kv_lora_rank // 32]
    rope: Array  # [requests, max_len, qk_rope_dim]

    @classmethod
    def of(cls, latent: Array, rope: Array, kind: KVCache) -> "LatentCache":
        """Cache entries for new tokens, in the cache's format."""
        steps, scale = _encode(latent, kind)
        return cls(steps, scale, rope.astype(jnp.bfloat16 if kind in ("int8", "mxfp4") else kind))

    @property
    def kind(self) -> KVCache:
        """Format of the latent."""
        return _kind(self.latent)

    def write(
        self,
        latent: Float[Array, "requests new c"],
        rope: Float[Array, "requests new r"],
        positions: Int[Array, "requests new"],
    ) -> "LatentCache":
        """The cache with new tokens at `positions`; beyond `max_len` they are dropped."""
        return _written(self, LatentCache.of(latent, rope, self.kind), positions)

    def read(self, dtype: Any) -> Float[Array, "requests max_len c"]:
        """The latent in floating point."""
        return _decode(self.latent, self.scale, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedCache:
    """Cache of one layer, or of a stack of layers with a leading axis."""

    key: Array  # [requests, max_len, kv_heads, head_dim], int8 if scales are given; MXFP4: half
    value: Array  # likewise
    key_scale: Array | None  # [requests, max_len, kv_heads] float32; MXFP4: [.., head_dim // 32]
    value_scale: Array | None

    @classmethod
    def of(cls, key: Array, value: Array, kind: KVCache) -> "GroupedCache":
        """Cache entries for new tokens, in the cache's format."""
        (key, key_scale), (value, value_scale) = _encode(key, kind), _encode(value, kind)
        return cls(key, value, key_scale, value_scale)

    @property
    def kind(self) -> KVCache:
        """Format of keys and values."""
        return _kind(self.key)

    def write(
        self,
        key: Float[Array, "requests new heads d"],
        value: Float[Array, "requests new heads d"],
        positions: Int[Array, "requests new"],
    ) -> "GroupedCache":
        """The cache with new tokens at `positions`; beyond `max_len` they are dropped."""
        return self.put(GroupedCache.of(key, value, self.kind), positions)

    def put(self, new: "GroupedCache", positions: Int[Array, "requests new"]) -> "GroupedCache":
        """`write` of entries in the cache's format."""
        return _written(self, new, positions)

    def read(self, dtype: Any) -> tuple[Array, Array]:
        """Keys and values in floating point."""
        return _decode(self.key, self.key_scale, dtype), _decode(
            self.value, self.value_scale, dtype
        )


LayerCache = LatentCache | GroupedCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelCache:
    """Caches of one microbatch's requests: `[layers, requests, max_len, ...]` per layer group."""

    dense: LayerCache | None
    moe: LayerCache | None
    mtp: LayerCache | None = None


def empty_cache(
    config: MoEConfig,
    requests: Any,
    max_len: Any,
    kind: KVCache,
    *,
    mtp: bool = False,
    tensor: int = 1,
) -> ModelCache:
    """A cache of zeros for `requests` requests of up to `max_len` tokens.

    With `tensor` ranks in a tensor-parallel group it holds the requests of all of them: of latent
    attention whole, of grouped-query attention a part of the heads.

    >>> from cmjax.models.moe.presets import tiny
    >>> empty_cache(tiny(), 2, 8, "int8").moe.latent.shape      # two MoE layers
    (2, 2, 8, 16)
    """
    sizes = config.attention

    def group(layers: int) -> LayerCache | None:
        if not layers:
            return None
        lead = (layers, requests * tensor, max_len)
        if isinstance(sizes, GroupedAttention):
            kv_heads = sizes.kv_heads_of(tensor)
            heads = jnp.zeros((*lead, kv_heads, sizes.head_dim), jnp.float32)
            return GroupedCache.of(heads, heads, kind)
        latent = jnp.zeros((*lead, sizes.kv_lora_rank), jnp.float32)
        rope = jnp.zeros((*lead, sizes.qk_rope_dim), jnp.float32)
        return LatentCache.of(latent, rope, kind)

    return ModelCache(
        group(len(config.dense_layers)), group(config.moe_layers), group(1) if mtp else None
    )


def extend_cache(cache: Any, max_len: int) -> Any:
    """Room for `max_len` tokens in a cache that prefill returned; from prefill to decode."""

    def pad(x):
        room = max_len - x.shape[2]
        if room < 0:
            raise ValueError(
                f"extend_cache: max_len must be at least the cached {x.shape[2]}, got {max_len}"
            )
        return jnp.pad(x, [(0, room if axis == 2 else 0) for axis in range(x.ndim)])

    return jax.tree.map(pad, cache)


def _encode(x: Array, kind: KVCache) -> tuple[Array, Array | None]:
    if kind not in KV_CACHES:
        raise ValueError(f"kv_cache must be one of {', '.join(KV_CACHES)}, got {kind!r}")
    if kind == "mxfp4":
        packed = quantize_weight(x, format="mxfp4")
        return packed.values, packed.scale
    return quantize_rows(x) if kind == "int8" else (x.astype(kind), None)


def _decode(steps: Array, scale: Array | None, dtype: Any) -> Array:
    if scale is None:
        return steps.astype(dtype)
    if _kind(steps) == "mxfp4":
        packed = QuantizedWeight(values=steps, scale=scale, format="mxfp4", group_size=32)
        return dequantize_weight(packed).astype(dtype)
    return dequantized(steps, scale, dtype)


def _kind(x: Array) -> KVCache:
    names: dict[str, KVCache] = {"int8": "int8", "uint8": "mxfp4", "float32": "float32"}
    return names.get(x.dtype.name, "bfloat16")


def _written[Cache: LayerCache](cache: Cache, new: Cache, positions: Array) -> Cache:
    request = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
    written = jax.tree.map(
        lambda old, entries: old.at[request, positions].set(entries, mode="drop"), cache, new
    )
    # XLA would write once for attention and once for the result, each into a copy of the cache
    return lax.optimization_barrier(written)
