"""1-D convolution of 8- or 16-bit integers by the C++ kernel: its filter layout and its call.

    y = activation(A^T (float(u . v) * scale) + bias),    v = round(B^T round(x / step) * requant)

with the matrices of a `toom_cook` algorithm; "direct" is F(1,1). The kernel takes and gives
float32, computes every step of the formula as it is rounded there (csrc/conv1d.h), and gives the
same bits with every instruction set and number of threads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int, Int32

from cmjax import native
from cmjax.primitives.convolution.nonfinite import Reach
from cmjax.primitives.convolution.toom_cook import ALGORITHMS

_PANEL = 16  # output channels that lie together
_GROUP_BYTES = 4  # of consecutive input channels, for one 32-bit lane
# Most that the weights of one sign of two consecutive rows may add up to, so that with operands
# offset to 1..255 AVX2's 16-bit sum of two products does not saturate: 255 * 128 < 2**15.
_MOST_PER_PAIR = 128


def serves(algorithm: str) -> bool:
    """Whether `conv1d` has the algorithm; the kernels may still be absent (`native.status()`)."""
    return algorithm in ALGORITHMS


def pack_filter(
    u: Int[Array, "points K cout"], *, tap_blocks: int
) -> Int[Array, "points panels rows 16 group"]:
    """Lay a transformed filter out for `conv1d`.

    Input channels are padded with zeros to whole groups (4 of int8, 2 of int16) within every tap
    block, output channels to panels of 16. Row 0 of a panel holds 16 int32, the starts of its
    accumulators: for int8, where the kernel offsets operands by 128, -128 times the sum of the
    column, and bit 0 says that AVX2's fast product could saturate on it (it then takes another).

    Args:
      u: int8 in -127..127, or int16, K = tap_blocks * cin.
      tap_blocks: blocks of the algorithm's taps, outermost in K.
    Raises: TypeError for another dtype; ValueError if K is no multiple of `tap_blocks`.
    """
    if u.dtype not in (jnp.int8, jnp.int16):
        raise TypeError(f"pack_filter: u must be int8 or int16, got {u.dtype}")
    if u.ndim != 3 or tap_blocks < 1 or u.shape[1] % tap_blocks:
        raise ValueError(
            f"pack_filter: u must be [points, K, cout] with K a multiple of tap_blocks={tap_blocks}"
            f", got {u.shape}"
        )
    points, k, cout = u.shape
    group = _GROUP_BYTES // u.dtype.itemsize
    cin, panels = k // tap_blocks, -(-cout // _PANEL)
    split = u.reshape(points, tap_blocks, cin, cout)
    padded = jnp.pad(split, ((0, 0), (0, 0), (0, -cin % group), (0, panels * _PANEL - cout)))
    rows = padded.reshape(points, -1, group, panels, _PANEL).transpose(0, 3, 1, 4, 2)
    starts = jnp.zeros((points, panels, 1, _PANEL), jnp.int32)
    if u.dtype == jnp.int8:
        starts = -128 * jnp.sum(rows, (2, 4), jnp.int32)[:, :, None, :]
        starts |= _may_saturate(rows).astype(jnp.int32)
    return jnp.concatenate([lax.bitcast_convert_type(starts, u.dtype), rows], axis=2)


def unpack_filter(
    packed: Int[Array, "points panels rows 16 group"],
    *,
    tap_blocks: int,
    cin: int,
    cout: int,
) -> Int[Array, "points K cout"]:
    """The filter that `pack_filter` was given."""
    points, panels, _, _, group = packed.shape
    rows = packed[:, :, 1:].transpose(0, 2, 4, 1, 3)
    padded = rows.reshape(points, tap_blocks, -(-cin // group) * group, panels * _PANEL)
    return padded[:, :, :cin, :cout].reshape(points, tap_blocks * cin, cout)


def conv1d(
    x: Float32[Array, "batch length cin"],
    packed: Int[Array, "points panels rows 16 group"],
    *,
    algorithm: str,
    tap_blocks: int,
    dilation: int,
    padding: tuple[int, int],
    out_length: int,
    inverse_step: Float32[Array, "cin"],
    requant: Float32[Array, "points"],
    scale: Float32[Array, "points cout"],
    bias: Float32[Array, "cout"],
    input_limit: int,
    operand_limit: int,
    slope: float,
    valid_range: Int32[Array, "batch 2"] | None = None,
    zero_point: int = 0,
    reach: Reach | None = None,
) -> Float32[Array, "batch out_length cout"]:
    """Quantize, transform, multiply, transform back, add the bias and activate, in one call.

    Only inside a primitive's `native` lowering: the kernels must be enabled. Operands that cannot
    be right are refused by the kernel with an error that begins with "conv1d:".

    Args:
      x: signal; frames outside it are zeros.
      packed: of `pack_filter`, with the algorithm's number of points.
      algorithm: a name in `toom_cook.ALGORITHMS`.
      tap_blocks: blocks of the algorithm's taps; block j meets tile t + dilation * j.
      dilation: frames between taps; more than 1 is for "direct" only.
      padding: frames of zeros before and after x.
      out_length: frames of the result; those that start beyond x and its padding see zeros.
      inverse_step: 1 / step of the input's quantization, per channel.
      requant: factor on each point of the transformed input, before it is rounded to an operand.
      scale: what one unit of an accumulator is worth, per point and output channel.
      bias: added to the output.
      input_limit: largest |quantized input|, at most 32767.
      operand_limit: largest |operand|: at most 127 for an int8 filter, 32767 for int16. The caller
        makes sure that K times it times the largest |u| fits int32.
      slope: of the activation max(y, slope * y): 1 for none, 0 for ReLU.
      valid_range: first frame of each result that is no padding and the one behind its last,
        [start, stop); the frames outside are zero.
      zero_point: of the input's integers; not 0, they lie in -input_limit - 1 - zero_point to
        input_limit - zero_point.
      reach: frames that an output is made of, where x is folded; NaN is written where one of them
        is not finite. By default every frame of x is one, and the tap blocks are full.
    Raises: ValueError if the algorithm is not served, or dilated though not direct.
    """
    if not serves(algorithm) or (dilation != 1 and algorithm != "direct"):
        raise ValueError(f"conv1d: no kernel for {algorithm!r} with dilation {dilation}")
    if reach is None:
        reach = Reach(1, 0, dilation, tap_blocks * ALGORITHMS[algorithm].r)
    out = jax.ShapeDtypeStruct((x.shape[0], out_length, bias.shape[0]), jnp.float32)
    return native.call(
        "cmjax_conv1d",
        out,
        x,
        packed,
        inverse_step,
        requant,
        scale,
        bias,
        jnp.zeros((0, 2), jnp.int32) if valid_range is None else valid_range,
        algorithm=algorithm,
        tap_blocks=np.int64(tap_blocks),
        dilation=np.int64(dilation),
        padding=np.int64(padding[0]),
        input_limit=np.int64(input_limit),
        operand_limit=np.int64(operand_limit),
        zero_point=np.int64(zero_point),
        frames=np.int64(reach.frames),
        lead=np.int64(reach.lead),
        spread=np.int64(reach.spread),
        taps=np.int64(reach.taps),
        slope=np.float32(slope),
    )


def _may_saturate(rows: Int[Array, "points panels groups 16 4"]) -> Array:
    """Which columns break the pair rule, [points, panels, 1, 16]."""
    pairs = rows.astype(jnp.int32).reshape(*rows.shape[:-1], 2, 2)
    positive = jnp.maximum(pairs, 0).sum(-1)
    negative = jnp.maximum(-pairs, 0).sum(-1)
    most = jnp.maximum(positive, negative).max((2, 4), initial=0)
    return (most > _MOST_PER_PAIR)[:, :, None, :]
