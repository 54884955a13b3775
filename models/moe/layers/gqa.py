"""Grouped-query attention (Ainslie et al. 2023), as Mixtral and Qwen3-MoE use it.

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
from jaxtyping import Array, Float, Int

from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.models.moe.layers.cache import GroupedCache
from cmjax.models.moe.layers.linear import Linear
from cmjax.models.moe.layers.norm import RMSNorm, rms_norm
from cmjax.models.moe.layers.rope import angles, rotate, softmax_scale
from cmjax.models.moe.parallelism import Parallelism
from cmjax.primitives.attention.cached import cached_attention
from cmjax.primitives.attention.exact import attention, visible_keys
from cmjax.primitives.attention.pasa import pasa_attention
from cmjax.program.mark import fused


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
        hidden, dim, bias = config.hidden_size, self.sizes.head_dim, self.sizes.bias
        columns = (heads + 2 * kv_heads) * dim
        self.norm = RMSNorm(hidden, config.norm_eps, rngs=rngs)
        self.qkv = linear(hidden, columns, bias=bias)
        ones = jnp.ones((dim,), jnp.float32)
        self.q_norm = nnx.Param(ones) if self.sizes.qk_norm else None
        self.k_norm = nnx.Param(ones) if self.sizes.qk_norm else None
        self.out = linear(heads * dim, hidden, bias=bias)

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
            q, k, v = self._project(x, positions)
            written = cache.write(k, v, positions)

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
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        with jax.named_scope("prolog"):
            q, k, v = self._project(x, positions)
            cache = GroupedCache.of(k, v, kind)
        with jax.named_scope("core"):
            found = self._attend(q, k, v, None)
        with jax.named_scope("output"):
            return self._leave(found), cache

    def _project(self, x, positions):
        q_norm = None if self.q_norm is None else self.q_norm[...]
        k_norm = None if self.k_norm is None else self.k_norm[...]
        kernel = _heads(self.config, self.parallelism.tensor)
        return kernel(self.qkv(self.parallelism.gather(self.norm(x))), positions, q_norm, k_norm)

    def _leave(self, found):
        return self.parallelism.scatter(self.out(found.reshape(*found.shape[:2], -1)))

    def _attend_cache(self, q, cache: GroupedCache, lengths):
        if self.arithmetic.attention == "exact" and cache.kind == "int8":
            assert cache.key_scale is not None and cache.value_scale is not None, "int8 has scales"
            entries = cache.key, cache.key_scale, cache.value, cache.value_scale
            options = {"scale": softmax_scale(self.config), "window": self.sizes.window}
            return cached_attention(q, *entries, lengths + q.shape[1], **options)
        return self._attend(q, *cache.read(q.dtype), lengths + q.shape[1])

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


@functools.cache
def _heads(config: MoEConfig, tensor: int) -> Callable:
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
