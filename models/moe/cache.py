"""The latent key/value cache of multi-head latent attention.

Per token and layer it holds the normalised latent (`kv_lora_rank` values, optionally INT8 with one
scale per token) and the rotated shared key (`qk_rope_dim` values).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmjax.primitives.exchange import quantize_rows
from models.moe.config import MoEConfig

KVCache = Literal["float32", "bfloat16", "int8"]
KV_CACHES = ("float32", "bfloat16", "int8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Cache of one layer, or of a stack of layers with a leading axis."""

    latent: Array  # [requests, max_len, kv_lora_rank], int8 if scale is given
    scale: Array | None  # [requests, max_len] float32
    rope: Array  # [requests, max_len, qk_rope_dim]

    @classmethod
    def of(cls, latent: Array, rope: Array, kind: KVCache) -> "LatentCache":
        """Cache entries for new tokens, in the cache's format."""
        if kind not in KV_CACHES:
            raise ValueError(f"kv_cache must be one of {', '.join(KV_CACHES)}, got {kind!r}")
        if kind == "int8":
            steps, scale = quantize_rows(latent)
            return cls(steps, scale, rope.astype(jnp.bfloat16))
        return cls(latent.astype(kind), None, rope.astype(kind))

    @property
    def kind(self) -> KVCache:
        """Format of the latent."""
        if self.scale is not None:
            return "int8"
        return "float32" if self.latent.dtype == jnp.float32 else "bfloat16"

    def write(
        self,
        latent: Float[Array, "requests new c"],
        rope: Float[Array, "requests new r"],
        positions: Int[Array, "requests new"],
    ) -> "LatentCache":
        """The cache with new tokens at `positions`; beyond `max_len` they are dropped."""
        new = LatentCache.of(latent, rope, self.kind)
        request = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
        return jax.tree.map(
            lambda old, entries: old.at[request, positions].set(entries, mode="drop"), self, new
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelCache:
    """Caches of one microbatch's requests: `[layers, requests, max_len, ...]` per layer group."""

    dense: LatentCache | None
    moe: LatentCache | None
    mtp: LatentCache | None = None


def empty_cache(
    config: MoEConfig, requests: Any, max_len: Any, kind: KVCache, *, mtp: bool = False
) -> ModelCache:
    """A cache of zeros for `requests` requests of up to `max_len` tokens."""

    def group(layers: int) -> LatentCache | None:
        if not layers:
            return None
        latent = jnp.zeros((layers, requests, max_len, config.kv_lora_rank), jnp.float32)
        rope = jnp.zeros((layers, requests, max_len, config.qk_rope_dim), jnp.float32)
        return LatentCache.of(latent, rope, kind)

    return ModelCache(
        group(config.dense_layers), group(config.moe_layers), group(1) if mtp else None
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
