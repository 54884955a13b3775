"""Rotary positions (Su et al. 2021) with YaRN (Peng et al. 2023), as DeepSeek-V3 uses them."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from models.moe.config import MoEConfig


def frequencies(config: MoEConfig) -> np.ndarray:
    """Radians per position of each rotated pair, `[qk_rope_dim / 2]` float32.

    YaRN divides the frequency by `factor` where a dimension turns less than `beta_slow` times over
    the original context, keeps it above `beta_fast` turns, and ramps linearly in between.
    """
    dim = config.qk_rope_dim
    freq = config.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    yarn = config.yarn
    if yarn is None:
        return freq.astype(np.float32)

    def dimension_of(turns: float) -> float:
        """The dimension index at which a pair turns `turns` times over the original context."""
        wavelength = yarn.original_max_position / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), dim - 1)
    # a zero-width ramp is a step
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return (freq * (1 - ramp) + freq / yarn.factor * ramp).astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 * mscale * ln(factor) + 1`: how much attention sharpens when context grows."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_amplitude(config: MoEConfig) -> float:
    """Factor on cos and sin."""
    yarn = config.yarn
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        top = yarn_mscale(yarn.factor, yarn.mscale)
        return top / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def softmax_scale(config: MoEConfig) -> float:
    """Factor on attention scores, `qk_dim ** -0.5` times YaRN's temperature squared."""
    scale = config.qk_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def angles(
    positions: Int[Array, "*batch"], config: MoEConfig
) -> tuple[Float32[Array, "*batch half"], Float32[Array, "*batch half"]]:
    """cos and sin of each position's rotation, amplitude included."""
    turn = positions.astype(jnp.float32)[..., None] * frequencies(config)
    amplitude = rotary_amplitude(config)
    return jnp.cos(turn) * amplitude, jnp.sin(turn) * amplitude


def rotate(
    x: Float[Array, "*batch dim"],
    cos: Float[Array, "*batch half"],
    sin: Float[Array, "*batch half"],
    *,
    interleave: bool,
) -> Float[Array, "*batch dim"]:
    """Rotate pairs of the last axis; the result has first members first, second members last.

    Queries and keys are permuted alike, so their products do not depend on that order.
    """
    y = x.astype(jnp.float32)
    if interleave:
        first, second = y[..., 0::2], y[..., 1::2]
    else:
        first, second = jnp.split(y, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
