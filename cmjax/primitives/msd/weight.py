"""Weights as INT8 or MXFP4, stored [features, inner] as `msd_dot` reads them.

    int8    w ~ scale * (q + offset),   q in [-127, 127],  one scale per output feature or group
    mxfp4   w ~ 2**(e - 127) * E2M1,    one E8M0 exponent e per block of 32 (OCP MX v1.0)

The inner dimension is last, so that an output is the product of two contiguous vectors: on CPU the
layout decides more than anything else, through XLA as through kernels.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, UInt8

from cmjax.primitives.define import count_where
from cmjax.primitives.msd import mxfp4

WeightFormat = Literal["int8", "mxfp4"]
_NAME = "quantize_weight"
FORMATS = ("int8", "mxfp4")
SMALLEST = 2.0**-100
"""Maxima under this count as zero, so that no intermediate result is a denormal number."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight matrix, or a stack of them, as few-bit steps. A pytree: pass it as an argument.

    Fields:
      values: int8 `[*stack, features, inner]`, or for mxfp4 uint8 `[*stack, features, inner // 2]`
        with two codes per byte.
      scale: int8: float32 `[*stack, features]`, or `[*stack, features, groups]`; mxfp4: uint8
        exponents `[*stack, features, inner // 32]`.
      offset: float32 of the shape of `scale`, in steps, or `None` for symmetric weights.
      format: "int8" or "mxfp4".
      group_size: inner elements that share a scale; `None` for the whole row (int8 only).
    """

    values: Int8[Array, "*stack n k"] | UInt8[Array, "*stack n bytes"]
    scale: Float32[Array, "..."] | UInt8[Array, "..."]
    offset: Float32[Array, "..."] | None = None
    format: WeightFormat = dataclasses.field(default="int8", metadata={"static": True})
    group_size: int | None = dataclasses.field(default=None, metadata={"static": True})


def quantize_weight(
    w: Float[Array, "*stack n k"],
    *,
    format: WeightFormat = "int8",
    group_size: int | None = None,
    symmetric: bool = True,
) -> QuantizedWeight:
    """Round weights to INT8 or MXFP4 steps, to nearest with ties to even.

    Args:
      w: `[*stack, features, inner]`, floating point: an `[in, out]` matrix is transposed first.
      format: "int8" (error at most half a scale) or "mxfp4". The MXFP4 scale is the smallest power
        of two that holds the block's maximum; the OCP specification's example rounds it down
        instead and saturates.
      group_size: int8: inner elements per scale, a divisor of `inner`; `None` for one scale per
        feature. mxfp4: 32 or `None`, which mean the same.
      symmetric: int8 only. `False` fits the range [min, max] with an offset: one more bit for
        one-sided weights.
    Raises: ValueError, TypeError: another format or dtype; `inner` not a multiple of the group;
      an infinity or NaN in a concrete `w` (under `jit` the features that hold one become NaN, or
      infinite in mxfp4).
    Example: a scale per output feature, 127 of which are its largest magnitude.

      >>> q = quantize_weight(jnp.array([[127.0, -63.5], [0.0, 254.0]]))
      >>> q.values.tolist(), q.scale.tolist()
      ([[127, -64], [0, 127]], [1.0, 2.0])
    """
    check_format(_NAME, format)
    _check(w, format, group_size, symmetric)
    if count_where(lambda v: ~jnp.isfinite(v), w):
        raise ValueError(f"{_NAME}: w holds infinities or NaN; replace them before rounding")
    w = jnp.asarray(w).astype(jnp.float32)
    if format == "mxfp4":
        return _to_mxfp4(w)
    size = group_size or w.shape[-1]
    groups = w.reshape(*w.shape[:-1], w.shape[-1] // max(size, 1), size)
    if symmetric:
        scale, offset = _nonzero(jnp.max(jnp.abs(groups), axis=-1) / 127), None
        q = jnp.round(groups / scale[..., None])
    else:
        low, high = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
        spread = high / 255 - low / 255  # in this order: high - low may overflow
        level = jnp.maximum(high, -low) / 127
        scale = _nonzero(jnp.where(spread < SMALLEST, level, spread))
        offset = low / scale + 128
        q = jnp.clip(jnp.round(groups / scale[..., None] - offset[..., None]), -128, 127)
    values = q.astype(jnp.int8).reshape(w.shape)
    if group_size is None:
        scale, offset = scale[..., 0], None if offset is None else offset[..., 0]
    return QuantizedWeight(values=values, scale=scale, offset=offset, group_size=group_size)


def dequantize_weight(weight: QuantizedWeight) -> Float32[Array, "*stack n k"]:
    """The float32 matrix that `weight` stands for (for mxfp4 exactly).

    Args:
      weight: of `quantize_weight`.
    Example:

      >>> dequantize_weight(quantize_weight(jnp.array([[127.0, -63.5]]))).tolist()
      [[127.0, -64.0]]
    """
    return dequantize(weight.values, weight.scale, weight.offset, weight.format)


def dequantize(values, scale, offset, format) -> Float32[Array, "*stack n k"]:
    """`dequantize_weight` of its fields."""
    if format == "mxfp4":
        steps, scale = mxfp4.unpack(values), 0.5 * mxfp4.scale_of(scale)
    else:
        steps = values
    steps = steps.astype(jnp.float32)
    if scale.ndim < steps.ndim:
        scale, offset = scale[..., None], None if offset is None else offset[..., None]
    groups = steps.reshape(*scale.shape, steps.shape[-1] // scale.shape[-1])
    if offset is not None:
        groups = groups + offset[..., None]
    return (groups * scale[..., None]).reshape(steps.shape)


def check_format(what: str, format: str) -> None:
    """ValueError unless `format` is known."""
    if format not in FORMATS:
        raise ValueError(f'{what}: format must be "int8" or "mxfp4", got {format!r}')


def _to_mxfp4(w):
    blocks = w.reshape(*w.shape[:-1], w.shape[-1] // mxfp4.BLOCK, mxfp4.BLOCK)
    top = jnp.max(jnp.abs(blocks), axis=-1)
    exponent = mxfp4.ceil_log2_of_sixth(jnp.maximum(top, SMALLEST))
    # Half-steps: 2 w / 2**e. The largest exponent is 126, so its inverse is a normal number.
    half = 2.0 * blocks * mxfp4.power_of_two(-exponent)[..., None]
    values = mxfp4.pack(mxfp4.round_to_e2m1(half, "even").astype(jnp.int8).reshape(w.shape))
    exponent = jnp.where(jnp.isfinite(top), exponent + mxfp4.BIAS, 255)
    return QuantizedWeight(
        values=values,
        scale=exponent.astype(jnp.uint8),
        format="mxfp4",
        group_size=mxfp4.BLOCK,
    )


def _nonzero(scale):
    """A row of zeros gets scale 1: any would do, and dividing by zero would not."""
    return jnp.where(scale < SMALLEST, 1.0, scale).astype(jnp.float32)


def _check(w, format, group_size, symmetric):
    if jnp.ndim(w) < 2 or not jnp.issubdtype(jnp.result_type(w), jnp.floating):
        raise TypeError(
            f"{_NAME}: w must be floating point [..., features, inner], got "
            f"{jnp.result_type(w)}{list(jnp.shape(w))}"
        )
    inner = jnp.shape(w)[-1]
    if format == "mxfp4":
        if group_size not in (None, mxfp4.BLOCK):
            raise ValueError(
                f"{_NAME}: the blocks of mxfp4 have 32 values, got group_size={group_size}"
            )
        if not symmetric:
            raise ValueError(f"{_NAME}: mxfp4 has no offset; use symmetric=True, or int8")
        group_size = mxfp4.BLOCK
    if group_size is not None and (group_size < 1 or inner % group_size):
        raise ValueError(
            f"{_NAME}: the inner dimension {inner} must be a multiple of the group size, "
            f"got {group_size}"
        )
    if inner < 1:
        raise ValueError(f"{_NAME}: w has no inner dimension to quantize, got 0 columns")
