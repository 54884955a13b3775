"""`grouped_dot` with INT8 or MXFP4 matrices that are never dequantized: experts in W8A16, W4A16.

    y[r] = msd_dot(x[r], w[g])      for the sizes[g] rows of group g

Every row is split as `msd_dot` splits it (Zheng et al., arXiv 2605.13915), so the results are those
of `msd_dot` bit by bit; only matrices that have rows are read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax import native
from cmjax.primitives.define import define, straight_through
from cmjax.primitives.grouped.product import check_groups, check_sizes, one_after_another
from cmjax.primitives.grouped.tiles import by_tiles
from cmjax.primitives.msd.decompose import check_activations, check_finite, decompose_instructions
from cmjax.primitives.msd.product import msd_dot, recombine_instructions
from cmjax.primitives.msd.weight import QuantizedWeight, dequantize
from cmjax.program import Work, cost_rule, matmul_flops


def grouped_msd_dot(
    x: Float[Array, "rows k"], w: QuantizedWeight, sizes: Int[Array, "groups"]
) -> Float[Array, "rows n"]:
    """Multiply every row with the few-bit matrix of its group, in two passes.

        >>> from cmjax.primitives.msd import quantize_weight
        >>> w = quantize_weight(jnp.array([[[127.0, 0.0]], [[0.0, 254.0]]]))
        >>> grouped_msd_dot(jnp.array([[1.0, 2.0], [3.0, 4.0]]), w, jnp.array([1, 1])).tolist()
        [[127.0], [1016.0]]

    Args:
      x: rows in the order of their groups, floating point.
      w: `[groups, features, inner]`: int8 with one scale per feature and no offset, or MXFP4.
      sizes: rows of each group; those behind the last group give zeros.
    Returns: the dtype of `x`.
    Gradient: straight-through for `x`; none for `w`.
    Raises: ValueError, TypeError: shapes or dtypes that do not fit, scales per group of inner
      elements, an offset; and where the values are known, sizes that cannot be, or an infinity or
      NaN in `x`.
    """
    check_activations("grouped_msd_dot", x)
    check_finite("grouped_msd_dot", "x", x)
    if w.offset is not None or (w.format == "int8" and w.group_size is not None):
        raise ValueError(
            "grouped_msd_dot: int8 matrices must have one scale per feature and no offset; use "
            "msd_dot for others"
        )
    x, sizes = jnp.asarray(x), jnp.asarray(sizes).astype(jnp.int32)
    _check(*map(jax.typeof, (x, w.values, w.scale, sizes)), format=w.format)
    check_sizes("grouped_msd_dot", sizes, x.shape[0])
    return grouped_msd_dot_p.bind(x, w.values, w.scale, sizes, format=w.format)


def _weight(values, scale, format):
    group = 32 if format == "mxfp4" else None
    return QuantizedWeight(values=values, scale=scale, format=format, group_size=group)


def _reference(x, values, scale, sizes, *, format):
    product = lambda x, w: msd_dot(x, _weight(w[0], w[1], format))  # noqa: E731
    return by_tiles(product, x, (values, scale), sizes, values.shape[1], x.dtype)


def _native(x, values, scale, sizes, *, format):
    if min(*x.shape, *values.shape) == 0:
        return _reference(x, values, scale, sizes, format=format)
    kept = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32  # what the kernels read
    out = jax.ShapeDtypeStruct((x.shape[0], values.shape[1]), kept)
    operands = x.astype(kept), values, scale, sizes
    return native.call(f"cmjax_grouped_msd_{format}", out, *operands).astype(x.dtype)


def _check(x, values, scale, sizes, *, format):
    wanted, codes = (jnp.uint8, 2) if format == "mxfp4" else (jnp.int8, 1)
    if values.ndim != 3 or values.dtype != wanted:
        raise TypeError(
            f"grouped_msd_dot: w must be {jnp.dtype(wanted).name} [groups, features, inner] for "
            f"{format}, got {values.dtype}{list(values.shape)}"
        )
    groups, features, inner = values.shape[0], values.shape[1], values.shape[2] * codes
    check_groups("grouped_msd_dot", x, groups, inner, sizes)
    per_feature = (inner // 32,) if format == "mxfp4" else ()
    if scale.shape != (groups, features, *per_feature):
        raise ValueError(
            f"grouped_msd_dot: the scale of w must be {[groups, features, *per_feature]}, got "
            f"{list(scale.shape)}"
        )


def _exact(x, values, scale, sizes, *, format):
    """The product with dequantized matrices, whose derivative stands for the rounded one's."""
    w = jnp.swapaxes(dequantize(values, scale, None, format), 1, 2)
    return lax.ragged_dot(x.astype(jnp.float32), w, sizes).astype(x.dtype)


def _jvp(p, primals, tangents, **params):
    return straight_through(functools.partial(_exact, **params), p, primals, tangents, params)


def _batch(args, dims, **params):
    return one_after_another(grouped_msd_dot_p, args, dims, **params)


grouped_msd_dot_p = define(
    "cm_grouped_msd_dot", _reference, check=_check, jvp=_jvp, batch=_batch, native=_native
)


@cost_rule(grouped_msd_dot_p)
def _cost(x, values, scale, sizes, *, out, mesh, format) -> Work:
    """That of `msd_dot` in two passes, the matrices of all groups read once."""
    products = (out[0].size * x.shape[-1]) * 4.0
    vector = x.size * decompose_instructions(2) + out[0].size * recombine_instructions(2)
    return Work(
        kind="grouped",
        flops=products,
        vector_bytes=vector * 4.0,
        **matmul_flops(jnp.int8, products * (0.5 if format == "mxfp4" else 1.0), x.shape[-1]),
    )
