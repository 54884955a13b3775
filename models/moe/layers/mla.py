"""Multi-head latent attention (DeepSeek-V2, section 2.1; CloudMatrix384 paper, sections 4.2, 4.3).

Two forms of the same mathematics. *Expanded*, for prefill: keys and values are up-projected from
the latent, attention is causal over the prompt. *Absorbed*, for decode: the key up-projection moves
to the query (`q_latent = W_uk q_nope`) and the value up-projection to the output, so attention runs
over the latent cache itself.

With `Parallelism.sequence_parallel` the expanded form is the paper's SP -> TP -> SP: latents are
computed for the rank's own sequences, gathered, attended by `heads / ranks` heads, and exchanged
back. With `Parallelism.tensor` both forms gather the latents of a group of ranks, attend
`heads / tensor` heads, and sum what the output projection makes of them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax.models.moe.arithmetic import Arithmetic, AttentionCore, KVCache
from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.layers.cache import LatentCache
from cmjax.models.moe.layers.initial import normal
from cmjax.models.moe.layers.linear import Linear, Weight, matmul, products
from cmjax.models.moe.layers.norm import rms_norm
from cmjax.models.moe.layers.rope import angles, rotate, softmax_scale
from cmjax.models.moe.parallelism import Parallelism
from cmjax.primitives.attention.exact import attention, latent_attention, visible_keys
from cmjax.primitives.attention.pasa import pasa_attention
from cmjax.primitives.exchange import gather_ranks
from cmjax.primitives.grouped import stacked_dot
from cmjax.program.mark import fused

# DeepSeek's own code and transformers build these two norms without the config's epsilon.
_LATENT_NORM_EPS = 1e-6


class MLA(nnx.Module):
    """Attention of one layer, its input norm included; the residual is the caller's.

    The down-, query-up- and output-projections are in the arithmetic's format; the per-head
    up-projections of the latent (`up_key`, `up_value`) stay in floating point, because absorbed
    they act on activations.
    """

    def __init__(
        self, config: MoEConfig, parallelism: Parallelism, *, arithmetic: Arithmetic, rngs: nnx.Rngs
    ):
        self.config, self.parallelism, self.arithmetic = config, parallelism, arithmetic
        sizes = _sizes(config)
        heads, hidden = parallelism.heads(config), config.hidden_size
        dtype = arithmetic.dtype
        rank, q_rank = sizes.kv_lora_rank, sizes.q_lora_rank
        linear = functools.partial(Linear, format=arithmetic.projections, rngs=rngs)
        self.norm = nnx.Param(jnp.ones((hidden,), jnp.float32))
        self.q_a = None if q_rank is None else linear(hidden, q_rank, bias=sizes.bias)
        self.q_norm = None if q_rank is None else nnx.Param(jnp.ones((q_rank,), jnp.float32))
        self.q_b = linear(q_rank or hidden, heads * sizes.qk_dim)
        self.kv_a = linear(hidden, rank + sizes.qk_rope_dim, bias=sizes.bias)
        self.kv_norm = nnx.Param(jnp.ones((rank,), jnp.float32))
        up_key = normal(rngs.params(), (heads, sizes.qk_nope_dim, rank)) * rank**-0.5
        up_value = normal(rngs.params(), (heads, rank, sizes.v_dim)) * rank**-0.5
        self.up_key = nnx.Param(up_key.astype(dtype))
        self.up_value = nnx.Param(up_value.astype(dtype))
        self.out = linear(config.heads // parallelism.tensor * sizes.v_dim, hidden, bias=sizes.bias)

    def begin_decode(
        self,
        x: Float[Array, "requests new hidden"],
        cache: LatentCache,
        lengths: Int[Array, "group"],
    ) -> Callable[[], tuple[Float[Array, "requests new hidden"], LatentCache]]:
        """Absorbed form: write new latents, and give back how to attend the cache. `lengths` counts
        the cached tokens, not the new ones, which are added; like the cache it is of all requests
        of the tensor-parallel group."""
        new = x.shape[1]
        positions = lengths[:, None] + jnp.arange(new, dtype=jnp.int32)
        with jax.named_scope("prolog"):
            up = positions, self.q_b.matrix, self.up_key[...], cache
            if self.parallelism.tensor > 1:
                low = self._gathered(*_down_prolog(self.config)(x, None, self._down))
                q_latent, q_rope, written = _absorbed_up(self.config)(*low, *up)
            else:
                q_latent, q_rope, written = _absorbed_prolog(self.config)(x, self._down, *up)

        def attend():
            with jax.named_scope("core"):
                query = q_latent.astype(written.rope.dtype)
                rotated = q_rope.astype(written.rope.dtype)
                kernel = _latent_kernel(self.config, self.arithmetic.attention)
                found = kernel(query, rotated, written, lengths + new).astype(x.dtype)
            with jax.named_scope("output"):
                return self._leave(_per_head(found, self.up_value[...])), written

        return attend

    def prefill(
        self, x: Float[Array, "sequences prompt hidden"], kind: KVCache
    ) -> tuple[Float[Array, "sequences prompt hidden"], LatentCache]:
        """Expanded form, causal from position 0. Returns the cache entries of the prompt."""
        config, parallelism = self.config, self.parallelism
        splits_heads = parallelism.sequence_parallel and bool(parallelism.axes)
        positions = parallelism.positions(x.shape[1])
        with jax.named_scope("prolog"):
            if splits_heads or parallelism.tensor > 1:
                low = _down_prolog(config)(x, positions, self._down)
                q_low, latent, rope = self._gathered(*low)
                # the ranks of a tensor-parallel group go on to decode all of its requests
                own = (latent, rope) if parallelism.tensor > 1 else (low[1], low[2])
                cache = LatentCache.of(*own, kind)
                q_nope, q_rope = _up_prolog(config)(q_low, positions, self.q_b.matrix)
            else:
                q_nope, q_rope, latent, rope = _expanded_prolog(config)(
                    x, positions, self._down, self.q_b.matrix
                )
                cache = LatentCache.of(latent, rope, kind)
                latent, rope = self._whole_context(latent, rope)
        with jax.named_scope("core"):
            k_nope = jnp.einsum("bkc,hnc->bkhn", latent, self.up_key[...])
            value = jnp.einsum("bkc,hcv->bkhv", latent, self.up_value[...])
            heads = _attend_kernel(config, self.arithmetic.attention)(
                q_nope, q_rope, k_nope, rope, value, parallelism.seen(x)
            )
        with jax.named_scope("output"):
            if splits_heads:
                heads = lax.all_to_all(heads, parallelism.axes, 0, 2, tiled=True)
            return self._leave(heads), cache

    def _whole_context(self, latent, rope):
        """Latents of all parts of the sequences, in one message."""
        if self.parallelism.context == 1:
            return latent, rope
        own = jnp.concatenate([latent, rope], axis=-1)
        return jnp.split(self.parallelism.whole_context(own), [latent.shape[-1]], axis=-1)

    def _gathered(self, q_low, latent, rope):
        """Low-rank projections of all ranks' tokens, or of those of a group, in one message."""
        widths = (q_low.shape[-1], q_low.shape[-1] + latent.shape[-1])
        own = jnp.concatenate([q_low, latent, rope], axis=-1)
        if self.parallelism.sequence_parallel:
            gathered = gather_ranks(own, self.parallelism.axes)
        else:
            gathered = self.parallelism.gather(own)
        return jnp.split(gathered, widths, axis=-1)

    def _leave(self, heads):
        return self.parallelism.scatter(self.out(heads.reshape(*heads.shape[:2], -1)))

    @property
    def _down(self) -> tuple[Array, Weight | None, Array | None, Weight, Array]:
        return (
            self.norm[...],
            None if self.q_a is None else self.q_a.matrix,
            None if self.q_norm is None else self.q_norm[...],
            self.kv_a.matrix,
            self.kv_norm[...],
        )


def _project_down(config, x, positions, down):
    """Normalised query latent (without one: input), normalised key/value latent, shared key, which
    is rotated unless `positions` is None."""
    norm, q_a, q_norm, kv_a, kv_norm = down
    h = rms_norm(x, norm, config.norm_eps)
    if q_a is None:
        q_low, (kv,) = h, products(h, kv_a)
    else:
        q_low, kv = products(h, q_a, kv_a)
        q_low = rms_norm(q_low, q_norm, _LATENT_NORM_EPS)
    latent, rope = jnp.split(kv, [_sizes(config).kv_lora_rank], axis=-1)
    rope = rope if positions is None else _rotary(config)(rope, positions)
    return q_low, rms_norm(latent, kv_norm, _LATENT_NORM_EPS), rope


@functools.cache
def _rotary(config: MoEConfig) -> Callable:
    """The kernel that rotates, where there is none of the whole prolog."""

    @fused("RotaryEmbedding")
    def kernel(x, positions):
        cos, sin = angles(positions, config)
        return rotate(x, cos, sin, interleave=config.rope.interleave)

    return kernel


def _query(config, q_low, positions, q_b):
    """Per-head queries, split into the part without position and the rotated part."""
    q = matmul(q_low, q_b)
    q = q.reshape(*q.shape[:2], -1, _sizes(config).qk_dim)
    q_nope, q_rope = jnp.split(q, [_sizes(config).qk_nope_dim], axis=-1)
    return q_nope, _rotary(config)(q_rope, positions[..., None])  # alike for all heads


def _sizes(config: MoEConfig) -> LatentAttention:
    assert isinstance(config.attention, LatentAttention), "the caller chooses by this type"
    return config.attention


# MLAProlog is one kernel on the NPU: norm, projections and rotation never leave the chip. Which of
# them a form needs differs, so there is a kernel per form, made once per config. The kernels inside
# it are those of engines that have no such one.


@functools.cache
def _down_prolog(config: MoEConfig) -> Callable:
    @fused("MLAProlog")
    def prolog(x, positions, down):
        return _project_down(config, x, positions, down)

    return prolog


@functools.cache
def _up_prolog(config: MoEConfig) -> Callable:
    @fused("MLAProlog")
    def prolog(q_low, positions, q_b):
        return _query(config, q_low, positions, q_b)

    return prolog


@functools.cache
def _latent_kernel(config: MoEConfig, core: AttentionCore) -> Callable:
    """Attention over the latent cache. An INT8 latent is dequantized in the kernel; so is an MXFP4
    one, and PASA's float16 operands are made there."""

    @fused("FlashAttention")
    def attend(q_latent, q_rope, cache, lengths):
        scale = softmax_scale(config)
        if core == "exact" and cache.kind != "mxfp4":
            return latent_attention(
                q_latent, q_rope, cache.latent, cache.scale, cache.rope, lengths, scale=scale
            )
        latent = cache.read(q_latent.dtype)
        if core == "exact":
            return latent_attention(
                q_latent, q_rope, latent, None, cache.rope, lengths, scale=scale
            )
        visible = visible_keys(q_latent.shape[1], latent.shape[1], lengths, causal=True)
        assert visible is not None, "there are lengths"
        key = jnp.concatenate([latent, cache.rope.astype(latent.dtype)], axis=-1)
        return pasa_attention(
            jnp.concatenate([q_latent, q_rope], axis=-1),
            key[:, :, None],
            latent[:, :, None],
            mask=visible[:, None],
            scale=scale,
        )

    return attend


@functools.cache
def _attend_kernel(config: MoEConfig, core: AttentionCore) -> Callable:
    """FA takes the rotated parts as operands of their own: nothing is concatenated in HBM."""

    @fused("FlashAttention")
    def attend(q_nope, q_rope, k_nope, k_rope, value, lengths):
        k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        k = jnp.concatenate([k_nope, k_rope], axis=-1)
        scale = softmax_scale(config)
        if core == "pasa_fp16":
            assert lengths is None, "a context is split in training, which is exact"
            return pasa_attention(q, k, value, causal=True, scale=scale)
        return attention(q, k, value, scale=scale, causal=True, lengths=lengths)

    return attend


@functools.cache
def _expanded_prolog(config: MoEConfig) -> Callable:
    @fused("MLAProlog")
    def prolog(x, positions, down, q_b):
        q_low, latent, rope = _project_down(config, x, positions, down)
        return *_query(config, q_low, positions, q_b), latent, rope

    return prolog


@functools.cache
def _absorbed_prolog(config: MoEConfig) -> Callable:
    @fused("MLAProlog")
    def prolog(x, down, positions, q_b, up_key, cache):
        q_low, latent, rope = _project_down(config, x, positions, down)
        q_latent, q_rope = _absorbed_query(config, q_low, positions, q_b, up_key)
        return q_latent, q_rope, cache.write(latent, rope, positions)

    return prolog


@functools.cache
def _absorbed_up(config: MoEConfig) -> Callable:
    """The rest of `_absorbed_prolog`, after the low-rank projections of a group were gathered."""

    @fused("MLAProlog")
    def prolog(q_low, latent, rope, positions, q_b, up_key, cache):
        q_latent, q_rope = _absorbed_query(config, q_low, positions, q_b, up_key)
        rope = _rotary(config)(rope, positions)
        return q_latent, q_rope, cache.write(latent, rope, positions)

    return prolog


def _absorbed_query(config, q_low, positions, q_b, up_key):
    q_nope, q_rope = _query(config, q_low, positions, q_b)
    return _per_head(q_nope, up_key), q_rope


def _per_head(x, matrices):
    """Rows of every head by its matrix, for few rows: [batch, rows, heads, k] by [heads, k, n]."""
    y = stacked_dot(jnp.moveaxis(x, 2, 0), matrices, skip_zeros=False)
    return jnp.moveaxis(y, 0, 2)
