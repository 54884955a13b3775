"""The loops of a tiled convolution as array operations: windows in, products, tiles out.

Tile `t` computes outputs `m t` to `m t + m - 1` from the window of inputs that starts at `m t`, and
block `j` of the taps meets the transformed window of tile `t + j` (dilation d, direct only:
`t + d j`). Axes are [batch, tile, channel] throughout; a transform is a list over points.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Num

from cmjax.primitives.convolution.rsq import rounded
from cmjax.primitives.convolution.straight_line import Matrix, Multiply, StraightLine, as_float32
from cmjax.primitives.convolution.toom_cook import ALGORITHMS, Algorithm


def output_length(length: Any, padding: tuple[Any, Any], taps: int, dilation: int) -> Any:
    """Frames that a convolution without stride gives."""
    return length + padding[0] + padding[1] - dilation * (taps - 1)


def windows(
    x: Float[Array, "batch length cin"],
    algorithm: Algorithm,
    *,
    taps: int,
    dilation: int,
    padding: tuple[Any, Any],
) -> tuple[list[Float[Array, "batch tiles cin"]], Any]:
    """Column `j` of every window, for each j, and the number of output tiles.

    There are `dilation * (blocks - 1)` more windows than output tiles, for the later tap blocks.
    """
    m = algorithm.m
    outputs = output_length(x.shape[1], padding, taps, dilation)
    tiles = -(-outputs // m)
    count = tiles + dilation * (algorithm.tap_blocks(taps) - 1)
    last = m * (count - 1)
    behind = last + algorithm.window - x.shape[1] - padding[0]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (padding[0], behind, 0), (0, 0, 0)])
    columns = [
        lax.slice_in_dim(x, j, j + last + 1, m, axis=1) if m > 1 or algorithm.window > 1 else x
        for j in range(algorithm.window)
    ]
    return columns, tiles


def meet_blocks(
    v: Num[Array, "batch count cin"], tiles: Any, *, blocks: int, dilation: int
) -> Num[Array, "batch tiles depth"]:
    """What all tap blocks see of the transformed windows, side by side in channels."""
    if blocks == 1:
        return v
    seen = [lax.slice_in_dim(v, dilation * j, dilation * j + tiles, axis=1) for j in range(blocks)]
    return jnp.concatenate(seen, axis=-1)


def interleave(
    outputs: list[Float[Array, "batch tiles cout"]], length: Any
) -> Float[Array, "batch length cout"]:
    """Output `i` of every tile, for each i, in the order of time; what is past `length` goes."""
    batch, tiles, cout = outputs[0].shape
    y = outputs[0]
    if len(outputs) > 1:
        y = jnp.stack(outputs, axis=2).reshape(batch, tiles * len(outputs), cout)
    return lax.slice_in_dim(y, 0, length, axis=1)


def transform_filter(
    w: Float[Array, "taps cin cout"],
    algorithm: Algorithm,
    multiply: Multiply | None = None,
) -> list[Float[Array, "depth cout"]]:
    """G w, point by point, the tap blocks side by side in input channels."""
    taps, cin, cout = w.shape
    blocks = algorithm.tap_blocks(taps)
    w = jnp.pad(w, ((0, blocks * algorithm.r - taps), (0, 0), (0, 0)))
    w = w.reshape(blocks, algorithm.r, cin, cout)
    points = algorithm.g_program.apply([w[:, j] for j in range(algorithm.r)], multiply)
    return [point.reshape(blocks * cin, cout) for point in points]


def transform_filter_rounded(
    w: Float[Array, "taps cin cout"], algorithm: str
) -> Float32[Array, "points depth cout"]:
    """G w in float32, rounded alike in whatever program it stands."""
    return _transform_filter_rounded(w.astype(jnp.float32), algorithm)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _transform_filter_rounded(w, algorithm):
    form = ALGORITHMS[algorithm]
    return jnp.stack(transform_filter(w, form, lambda c, v: rounded(as_float32(c) * v)))


@_transform_filter_rounded.defjvp
def _transform_filter_rounded_jvp(algorithm, primals, tangents):
    """The transform is linear, so its derivative is itself, here in one product."""
    (w,), (dw,), form = primals, tangents, ALGORITHMS[algorithm]
    blocks = form.tap_blocks(w.shape[0])
    padded = jnp.pad(dw, ((0, blocks * form.r - w.shape[0]), (0, 0), (0, 0)))
    taps = jnp.moveaxis(padded.reshape(blocks, form.r, *w.shape[1:]), 1, 0)
    tangent = mix_points(form.g, taps).reshape(form.n, -1, w.shape[2])
    return _transform_filter_rounded(w, algorithm), tangent


def mix_points(matrix: Matrix, values: Float[Array, "columns *rest"]) -> Float[Array, "rows *rest"]:
    """A transform as one product with its matrix: for derivatives, which keep no order of sums.

    Straight-line code and its derivative are hundreds of small operations; this is one.
    """
    coefficients = np.array([[as_float32(c) for c in row] for row in matrix])
    return jnp.einsum("rc,c...->r...", coefficients, values, precision=lax.Precision.HIGHEST)


def transform_instructions(program: StraightLine) -> float:
    """Vector instructions of a transform, per channel and tile: a constant factor costs one."""
    return float(program.additions + program.products)
