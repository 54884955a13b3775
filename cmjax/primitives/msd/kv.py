"""Keys and values as INT8 or MXFP4, as `msd_attention` reads them.

int8    k ~ k_scale * k_q,     a scale per token and head, or per head and channel
mxfp4   blocks of 32 along the contracted axis: channels for keys, tokens for values
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, UInt8

from cmjax.primitives.define import count_where
from cmjax.primitives.msd import mxfp4
from cmjax.primitives.msd.weight import WeightFormat, check_format, quantize_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedKV:
    """A cache of keys and values as few-bit steps.

    Fields:
      k, v: int8 `[batch, kv_len, kv_heads, d]` and `[..., dv]`; mxfp4: uint8 of half the last axis,
        two codes per byte.
      k_scale, v_scale: int8: float32 that broadcast against k and v, `[batch, kv_len, kv_heads, 1]`
        per token or `[batch or 1, 1, kv_heads, d]` per channel; mxfp4: uint8 exponents
        `[batch, kv_len, kv_heads, d // 32]` and `[batch, kv_len // 32, kv_heads, dv]`.
      format: "int8" or "mxfp4".
    """

    k: Int8[Array, "batch kv_len kv_heads d"] | UInt8[Array, "batch kv_len kv_heads d_bytes"]
    v: Int8[Array, "batch kv_len kv_heads dv"] | UInt8[Array, "batch kv_len kv_heads dv_bytes"]
    k_scale: Float32[Array, "#batch #kv_len kv_heads #d"] | UInt8[Array, "..."]
    v_scale: Float32[Array, "#batch #kv_len kv_heads #dv"] | UInt8[Array, "..."]
    format: WeightFormat = dataclasses.field(default="int8", metadata={"static": True})


def quantize_kv(
    k: Float[Array, "batch kv_len kv_heads d"],
    v: Float[Array, "batch kv_len kv_heads dv"],
    *,
    format: WeightFormat = "int8",
    per: Literal["token", "channel"] = "token",
) -> QuantizedKV:
    """Round keys and values to INT8 or MXFP4 steps.

    Args:
      k, v: floating point.
      format: "int8" or "mxfp4". MXFP4 needs `d`, and for the values `kv_len`, to be multiples of
        32, and `dv` to be even: matrix units want blocks along the axis they sum over.
      per: int8 only: what shares a scale. A cache that grows needs "token", or channel scales
        calibrated beforehand.
    Raises: ValueError: another format or `per`; ranks, lengths; an infinity or NaN in concrete
      operands.
    Source: Zheng et al., arXiv:2605.13915; blocks of MXFP4 as in OCP MX v1.0.
    Example:

      >>> cache = quantize_kv(jnp.ones((1, 3, 2, 8)), 2 * jnp.ones((1, 3, 2, 8)))
      >>> cache.k.dtype.name, cache.k_scale.shape, int(cache.v.max())
      ('int8', (1, 3, 2, 1), 127)
    """
    check_format("quantize_kv", format)
    if per not in ("token", "channel"):
        raise ValueError(f'quantize_kv: per must be "token" or "channel", got {per!r}')
    for name, x in (("k", k), ("v", v)):
        if jnp.ndim(x) != 4 or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(
                f"quantize_kv: {name} must be floating point [batch, kv_len, kv_heads, d], got "
                f"{jnp.result_type(x)}{list(jnp.shape(x))}"
            )
        if count_where(lambda a: ~jnp.isfinite(a), x):
            raise ValueError(f"quantize_kv: {name} holds infinities or NaN")
    if jnp.shape(k)[:-1] != jnp.shape(v)[:-1]:
        raise ValueError(
            f"quantize_kv: k and v must agree in all but d, got {jnp.shape(k)}, {jnp.shape(v)}"
        )
    if format == "int8":
        axis = -1 if per == "token" else 1
        (kq, k_scale), (vq, v_scale) = _to_int8(k, axis), _to_int8(v, axis)
        return QuantizedKV(k=kq, v=vq, k_scale=k_scale, v_scale=v_scale)
    if k.shape[-1] % mxfp4.BLOCK or k.shape[1] % mxfp4.BLOCK or v.shape[-1] % 2:
        raise ValueError(
            "quantize_kv: mxfp4 needs d and kv_len to be multiples of 32 and dv to be even, got "
            f"k {k.shape} and v {v.shape}"
        )
    keys = quantize_weight(k, format="mxfp4")
    values = quantize_weight(jnp.moveaxis(v, 1, -1), format="mxfp4")  # blocks of tokens
    steps = jnp.moveaxis(mxfp4.unpack(values.values), -1, 1)
    return QuantizedKV(
        k=keys.values,
        v=mxfp4.pack(steps),  # a token's channels side by side, as it is written to the cache
        k_scale=keys.scale,
        v_scale=jnp.moveaxis(values.scale, -1, 1),
        format="mxfp4",
    )


def keys_of(k, k_scale, format) -> Float32[Array, "*batch kv_len kv_heads d"]:
    """The float32 keys that a cache stands for (for mxfp4 exactly)."""
    if format == "int8":
        return k.astype(jnp.float32) * k_scale
    blocks = mxfp4.unpack(k).astype(jnp.float32).reshape(*k_scale.shape, mxfp4.BLOCK)
    whole = blocks * (0.5 * mxfp4.scale_of(k_scale))[..., None]
    return whole.reshape(*k.shape[:-1], 2 * k.shape[-1])


def values_of(v, v_scale, format) -> Float32[Array, "*batch kv_len kv_heads dv"]:
    """The float32 values that a cache stands for (for mxfp4 exactly)."""
    if format == "int8":
        return v.astype(jnp.float32) * v_scale
    steps = mxfp4.unpack(v).astype(jnp.float32)
    *lead, blocks, heads, dv = v_scale.shape
    whole = steps.reshape(*lead, blocks, mxfp4.BLOCK, heads, dv)
    return (whole * (0.5 * mxfp4.scale_of(v_scale))[..., None, :, :]).reshape(steps.shape)


def _to_int8(x, axis):
    weight = quantize_weight(jnp.moveaxis(x, axis, -1))
    return jnp.moveaxis(weight.values, -1, axis), jnp.expand_dims(weight.scale, axis)
