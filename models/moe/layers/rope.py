"""Rotary positions (Su et al. 2021), and the ways to stretch them over longer contexts."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.positions import DynamicScaling, LinearScaling, Llama3Scaling, YarnConfig


def frequencies(config: MoEConfig) -> np.ndarray:
    """Radians per position of each rotated pair, `[rope_dim / 2]` float32.

    YaRN divides the frequency by `factor` where a dimension turns less than `beta_slow` times over
    the original context, keeps it above `beta_fast` turns, and ramps linearly over the dimensions
    in between. Llama 3's scaling does likewise, with a ramp over the turns.
    """
    dim, theta = config.rope_dim, config.rope.theta
    freq = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    match config.rope.scaling:
        case None | DynamicScaling():
            pass
        case LinearScaling(factor=factor):
            freq = freq / factor
        case Llama3Scaling() as llama:
            turns = llama.original_max_position * freq / (2 * math.pi)
            width = llama.high_freq_factor - llama.low_freq_factor
            keep = np.clip((turns - llama.low_freq_factor) / width, 0, 1)
            freq = freq * keep + freq / llama.factor * (1 - keep)
        case YarnConfig() as yarn:
            keep = 1 - _yarn_ramp(yarn, dim, theta)
            freq = freq * keep + freq / yarn.factor * (1 - keep)
    return freq.astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 * mscale * ln(factor) + 1`: how much attention sharpens when context grows."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_amplitude(config: MoEConfig) -> float:
    """Factor on cos and sin."""
    yarn = config.rope.scaling
    if not isinstance(yarn, YarnConfig):
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        top = yarn_mscale(yarn.factor, yarn.mscale)
        return top / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def softmax_scale(config: MoEConfig) -> float:
    """Factor on attention scores: `qk_dim ** -0.5`, with latent attention times the temperature
    squared of a scaling (any, not only YaRN) that has `mscale_all_dim`."""
    scale, scaling = config.attention.qk_dim**-0.5, config.rope.scaling
    latent = isinstance(config.attention, LatentAttention)
    if latent and scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def check_length(config: MoEConfig, length: Any) -> None:
    """Raise ValueError if `length` positions are more than the frequencies are fixed for."""
    if isinstance(config.rope.scaling, DynamicScaling) and length > config.max_position:
        raise ValueError(
            f"rope: 'dynamic' scaling changes every frequency beyond max_position "
            f"{config.max_position}, which a cache of rotated keys cannot follow; got {length} "
            "positions"
        )


def angles(
    positions: Int[Array, "*batch"], config: MoEConfig
) -> tuple[Float32[Array, "*batch half"], Float32[Array, "*batch half"]]:
    """cos and sin of each position's rotation, amplitude included."""
    turn = positions.astype(jnp.float32)[..., None] * frequencies(config)
    amplitude = rotary_amplitude(config)
    return jnp.cos(turn) * amplitude, jnp.sin(turn) * amplitude


def rotate(
    x: Float[Array, "*#batch dim"],
    cos: Float[Array, "*#batch half"],
    sin: Float[Array, "*#batch half"],
    *,
    interleave: bool,
) -> Float[Array, "*batch dim"]:
    """Rotate pairs of the last axis, as many as there are angles; the rest of the axis passes.

    The result has first members first, then second members, then the rest. Queries and keys are
    permuted alike, so their products do not depend on that order.
    """
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        turned = rotate(x[..., :width], cos, sin, interleave=interleave)
        return jnp.concatenate([turned, x[..., width:]], axis=-1)
    y = x.astype(jnp.float32)
    if interleave:
        first, second = y[..., 0::2], y[..., 1::2]
    else:
        first, second = jnp.split(y, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _yarn_ramp(yarn: YarnConfig, dim: int, theta: float) -> np.ndarray:
    """0 where a dimension is kept, 1 where it is interpolated."""

    def dimension_of(turns: float) -> float:
        """The dimension index at which a pair turns `turns` times over the original context."""
        wavelength = yarn.original_max_position / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # a zero-width ramp is a step
    return np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
