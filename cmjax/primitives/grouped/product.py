"""Rows sorted by group, each multiplied with the matrix of its group: a layer of experts.

    y[r] = x[r] @ w[g]      for the sizes[g] rows of group g, which follow those of group g - 1

It is `lax.ragged_dot`, lowered so that a matrix without rows is never read: a decode step of a
mixture of experts touches the experts its tokens go to and no others.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Int32

from cmjax import native
from cmjax.primitives.define import count_where, define, straight_through
from cmjax.primitives.grouped.stacked import check_dtypes, kernel_serves, result_dtype
from cmjax.primitives.grouped.tiles import by_tiles
from cmjax.program import Work, cost_rule
from cmjax.program.work import Operand, matmul_flops


def grouped_dot(
    x: Float[Array, "rows k"] | Int8[Array, "rows k"],
    w: Float[Array, "groups k n"] | Int8[Array, "groups k n"],
    sizes: Int[Array, "groups"],
) -> Float[Array, "rows n"] | Int32[Array, "rows n"]:
    """Multiply every row with the matrix of its group.

        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> w = jnp.stack([jnp.eye(2), 10 * jnp.eye(2), 100 * jnp.eye(2)])
        >>> grouped_dot(x, w, jnp.array([1, 0, 2])).tolist()
        [[1.0, 2.0], [300.0, 400.0], [500.0, 600.0]]

    Args:
      x: rows in the order of their groups, floating point or int8.
      w: a matrix for each group, of the same dtype.
      sizes: rows of each group; those behind the last group give zeros.
    Returns: the dtype of `x`, or int32 of int8.
    Gradient: that of the formula, for `x` and `w`.
    Raises: ValueError, TypeError: shapes or dtypes that do not fit; and where the values are known,
      a negative size, or sizes that add up to more rows than there are (under `jit` the kernel
      refuses both; XLA's lowering counts no row twice and none beyond the last).
    Source: Gale et al. 2023 (MegaBlocks, arXiv:2211.15841), section 4: dropless products.
    """
    sizes = jnp.asarray(sizes).astype(jnp.int32)
    _check(*map(jax.typeof, (x, w, sizes)))
    check_sizes("grouped_dot", sizes, x.shape[0])
    return grouped_dot_p.bind(x, w, sizes)


def check_sizes(what: str, sizes: Array, rows: int) -> None:
    """ValueError for sizes of groups that cannot be, where their values are known."""
    if negative := count_where(lambda s: s < 0, sizes):
        raise ValueError(f"{what}: sizes must not be negative, {negative} of {sizes.size} are")
    if count_where(lambda s: jnp.sum(s) > rows, sizes):
        raise ValueError(
            f"{what}: sizes add up to more than the {rows} rows of x; they count the rows of each "
            "group"
        )


def check_groups(what, x, groups, inner, sizes):
    """ValueError unless rows, groups and sizes belong together."""
    if x.ndim != 2 or x.shape[1] != inner:
        raise ValueError(
            f"{what}: x must be [rows, {inner}], as the matrices have {inner} inner elements, got "
            f"{list(x.shape)}"
        )
    if sizes.shape != (groups,):
        raise ValueError(
            f"{what}: sizes must have one entry for each of the {groups} matrices of w, got "
            f"{list(sizes.shape)}"
        )


def one_after_another(p, args, dims, **params):
    """Batching for operands whose groups follow each other: a call for each entry."""
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    found = [
        p.bind(
            *(
                a if d is None else lax.index_in_dim(a, i, d, keepdims=False)
                for a, d in zip(args, dims, strict=True)
            ),
            **params,
        )
        for i in range(size)
    ]
    return jnp.stack(found), 0


def _reference(x, w, sizes):
    product = lambda x, w, sizes: by_tiles(_one, x, w, sizes, w.shape[-1], result_dtype(x))  # noqa: E731
    return lax.platform_dependent(x, w, sizes, cpu=product, default=_ragged)


def _one(x, w):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=result_dtype(x))


def _ragged(x, w, sizes):
    return lax.ragged_dot(x, w, sizes, preferred_element_type=result_dtype(x))


def _native(x, w, sizes):
    if not kernel_serves(x, w) or min(*x.shape, *w.shape) == 0:
        return _reference(x, w, sizes)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[-1]), result_dtype(x))
    starts = jnp.zeros((0,), jnp.int32)  # none: a group's rows follow those before
    return native.call("cmjax_grouped_dot", out, x, w, starts, sizes, skip_zeros=np.bool_(False))


def _check(x, w, sizes):
    if w.ndim != 3:
        raise ValueError(f"grouped_dot: w must be [groups, k, n], got {list(w.shape)}")
    check_groups("grouped_dot", x, w.shape[0], w.shape[1], sizes)
    check_dtypes("grouped_dot", x, w)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"grouped_dot: sizes must be integers, got {sizes.dtype}")


def _jvp(p, primals, tangents):
    return straight_through(_ragged, p, primals, tangents, {})


def _batch(args, dims):
    return one_after_another(grouped_dot_p, args, dims)


grouped_dot_p = define(
    "cm_grouped_dot", _reference, check=_check, jvp=_jvp, batch=_batch, native=_native
)


@cost_rule(grouped_dot_p)
def _cost(x: Operand, w: Operand, sizes: Operand, *, out, **_) -> Work:
    """2 M N K FLOP on the cube cores whatever the groups are; HBM reads the matrices of all groups
    once, as with `ragged_dot`."""
    flops = out[0].size * x.shape[-1] * 2.0
    return Work(kind="grouped", flops=flops, **matmul_flops(x.dtype, flops, x.shape[-1]))
