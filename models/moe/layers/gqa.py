"""Grouped-query attention (Ainslie et al. 2023), as Mixtral, Qwen3-MoE and GLM-4.5 use it.

    q, k, v = split(norm(x) W_qkv);   y = W_o softmax(rot(q) rot(k)^T / sqrt(d) + mask) v

Qwen3 normalises queries and keys per head before rotating them. With a window, a query sees only
the newest keys. Every rank attends its own requests (data parallelism), or with the ranks of its
tensor-parallel group those of the group, with a part of the heads each.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.models.moe.layers.cache import GroupedCache
from cmjax.models.moe.layers.heads import cached_heads, is_one_call, rotary_heads
from cmjax.models.moe.layers.linear import Linear
from cmjax.models.moe.layers.norm import RMSNorm
from cmjax.models.moe.layers.rope import softmax_scale
from cmjax.models.moe.parallelism import Parallelism
from cmjax.primitives.attention.cached import cached_attention
from cmjax.primitives.attention.exact import attention, visible_keys
from cmjax.primitives.attention.pasa import pasa_attention
from cmjax.program import fused


class GQA(nnx.Module):
    """Attention of one layer, its input norm included; the residual is the caller's.

    Columns of `qkv` are all query heads, all key heads, all value heads (of this rank).
    """

    def __init__(
        self, config: MoEConfig, parallelism: Parallelism, *, arithmetic: Arithmetic, rngs: nnx.Rngs
    ):
        assert isinstance(config.attention, GroupedAttention), "the caller chooses by this type"
        self.config, self.sizes = config, config.attention
        self.parallelism, self.arithmetic = parallelism, arithmetic
        heads, kv_heads = parallelism.heads(config), self.sizes.kv_heads_of(parallelism.tensor)
        linear = functools.partial(Linear, format=arithmetic.projections, rngs=rngs)
        hidden, dim = config.hidden_size, self.sizes.head_dim
        columns = (heads + 2 * kv_heads) * dim
        self.norm = RMSNorm(hidden, config.norm_eps, rngs=rngs)
        self.qkv = linear(hidden, columns, bias=self.sizes.bias)
        ones = jnp.ones((dim,), jnp.float32)
        self.q_norm = nnx.Param(ones) if self.sizes.qk_norm else None
        self.k_norm = nnx.Param(ones) if self.sizes.qk_norm else None
        self.out = linear(heads * dim, hidden, bias=self.sizes.out_bias)

    def begin_decode(
        self,
        x: Float[Array, "requests new hidden"],
        cache: GroupedCache,
        lengths: Int[Array, "group"],
    ) -> Callable[[], tuple[Float[Array, "requests new hidden"], GroupedCache]]:
        """Write new keys and values, and give back how to attend the cache. `lengths` counts the
        cached tokens, not the new ones, which are added; like the cache it is of all requests of
        the tensor-parallel group."""
        positions = lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        with jax.named_scope("prolog"):
            q, written = self._write(self._columns(x), positions, cache)

        def attend():
            with jax.named_scope("core"):
                found = self._attend_cache(q, written, lengths)
            with jax.named_scope("output"):
                return self._leave(found), written

        return attend

    def prefill(
        self, x: Float[Array, "sequences prompt hidden"], kind: KVCache
    ) -> tuple[Float[Array, "sequences prompt hidden"], GroupedCache]:
        """Causal from position 0. Returns the cache entries of the prompt."""
        parallelism = self.parallelism
        positions = parallelism.positions(x.shape[1])
        with jax.named_scope("prolog"):
            q, k, v = self._heads(self._columns(x), positions)
            cache = GroupedCache.of(k, v, kind)
            k, v = parallelism.whole_context(k), parallelism.whole_context(v)
        with jax.named_scope("core"):
            found = self._attend(q, k, v, parallelism.seen(x))
        with jax.named_scope("output"):
            return self._leave(found), cache

    def _columns(self, x):
        return self.qkv(self.parallelism.gather(self.norm(x)))

    def _heads(self, columns, positions):
        q_norm = None if self.q_norm is None else self.q_norm[...]
        k_norm = None if self.k_norm is None else self.k_norm[...]
        return rotary_heads(self.config, self.parallelism.tensor)(
            columns, positions, q_norm, k_norm
        )

    def _write(self, columns, positions, cache: GroupedCache):
        """Queries, and the cache with the new entries."""

        def stages(columns, positions, cache):
            q, k, v = self._heads(columns, positions)
            return q, cache.write(k, v, positions)

        def call(columns, positions, cache):
            gains = (self.q_norm, self.k_norm)
            norms = tuple(gain[...] for gain in gains if gain is not None)
            tensor = self.parallelism.tensor
            q, new = cached_heads(self.config, tensor, columns, positions, norms, cache.kind)
            return q, cache.put(new, positions)

        if not is_one_call(columns, cache.kind):
            return stages(columns, positions, cache)
        return lax.platform_dependent(columns, positions, cache, cpu=call, default=stages)

    def _leave(self, found):
        return self.parallelism.scatter(self.out(found.reshape(*found.shape[:2], -1)))

    def _attend_cache(self, q, cache: GroupedCache, lengths):
        if self.arithmetic.attention == "exact" and cache.kind == "int8":
            assert cache.key_scale is not None and cache.value_scale is not None, "int8 has scales"
            entries = cache.key, cache.key_scale, cache.value, cache.value_scale
            options = {"scale": softmax_scale(self.config), "window": self.sizes.window}
            return cached_attention(q, *entries, lengths + q.shape[1], **options)

        def attend(q, cache: GroupedCache, lengths):
            return self._attend(q, *cache.read(q.dtype), lengths)

        encoded = cache.kind in ("int8", "mxfp4")  # it is read as it lies
        attend = fused("CachedAttention")(attend) if encoded else attend
        return attend(q, cache, lengths + q.shape[1])

    def _attend(self, q, k, v, lengths):
        scale, window = softmax_scale(self.config), self.sizes.window
        if self.arithmetic.attention == "exact":
            return attention(q, k, v, scale=scale, causal=True, lengths=lengths, window=window)
        if lengths is None and window is None:
            return pasa_attention(q, k, v, causal=True, scale=scale)
        visible = visible_keys(q.shape[1], k.shape[1], lengths, causal=True, window=window)
        assert visible is not None, "causal attention hides keys"
        mask = jnp.broadcast_to(visible, (q.shape[0], *visible.shape[-2:]))[:, None]
        return pasa_attention(q, k, v, mask=mask, scale=scale)
