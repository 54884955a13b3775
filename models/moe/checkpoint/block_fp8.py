"""Block-FP8 weights, as DeepSeek-V3 publishes them: E4M3 with one scale per 128 x 128 block.

    w[i, j] = q[i, j] * weight_scale_inv[i // 128, j // 128],     scale = max|w| of the block / 448

Source: DeepSeek-V3 report, section 3.3.2, and `inference/kernel.py` of its repository.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

MOST = 448.0
"""Largest value of E4M3."""
SCALE_SUFFIX = "_scale_inv"
"""What the name of a tensor's scales has after the tensor's own."""

Block = tuple[int, int]


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scales of a matrix."""
    return tuple(-(-size // width) for size, width in zip(shape, block, strict=True))


def dequantize(
    q: Float[Array, "rows columns"] | Int8[Array, "rows columns"],
    scale: Float[Array, "r c"],
    block: Block,
) -> Float32[Array, "rows columns"]:
    """The values of a matrix of few-bit steps, one scale per block."""
    rows = jnp.repeat(scale.astype(jnp.float32), block[0], axis=0)[: q.shape[0]]
    return q.astype(jnp.float32) * jnp.repeat(rows, block[1], axis=1)[:, : q.shape[1]]


def quantize(
    w: Float[Array, "rows columns"], block: Block
) -> tuple[Float[Array, "rows columns"], Float32[Array, "r c"]]:
    """E4M3 values and the scale of each block; a block of zeros has scale 1."""
    blocks = scale_shape(w.shape, block)
    room = [(0, n * b - size) for n, b, size in zip(blocks, block, w.shape, strict=True)]
    padded = jnp.pad(w.astype(jnp.float32), room)
    tiles = padded.reshape(blocks[0], block[0], blocks[1], block[1])
    top = jnp.max(jnp.abs(tiles), axis=(1, 3))
    scale = jnp.where(top > 0, top / MOST, 1.0)
    q = (tiles / scale[:, None, :, None]).reshape(padded.shape)[: w.shape[0], : w.shape[1]]
    return q.astype(jnp.float8_e4m3fn), scale
