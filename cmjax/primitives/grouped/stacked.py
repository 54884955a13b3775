"""A matrix product, or a stack of them, that is fast for few rows.

    y[s, r] = x[s, r] @ w[s]

The same numbers as `lax.dot_general`. XLA on CPU lays the matrix out anew at every call, which
costs more than the product itself where there are few rows; the kernel streams it once, as it lies
in memory. Rows of zeros, such as the unused places that `dispatch` delivers, cost no product.
"""

import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Int32

from cmjax import native
from cmjax.primitives.define import define
from cmjax.program import Work, cost_rule
from cmjax.program.work import Operand, matmul_flops, of_stack

_MOST_ROWS = {"avx2": {"bfloat16": 256, "int8": sys.maxsize}}


def stacked_dot(
    x: Float[Array, "*stack_and_rows k"] | Int8[Array, "*stack_and_rows k"],
    w: Float[Array, "*stack k n"] | Int8[Array, "*stack k n"],
    *,
    skip_zeros: bool = True,
) -> Float[Array, "*stack_and_rows n"] | Int32[Array, "*stack_and_rows n"]:
    """`x @ w` for each matrix of a stack; without a stack `x` may have any number of rows' axes.

        >>> x = jnp.array([[[1.0, 2.0]], [[0.0, 1.0]]])
        >>> stacked_dot(x, jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])).tolist()
        [[[1.0, 2.0]], [[0.0, 2.0]]]

    Args:
      x: floating point, or int8.
      w: of the same dtype; the stack is its leading axes.
      skip_zeros: of a stack, rows may be unused places, which are left out, and with all of its
        rows a matrix. False where every row is used, as with a matrix for every head.
    Returns: the dtype of `x`, summed in float32 and rounded once (by the kernel; XLA chooses its
      own way); int32 of int8, exactly.
    Gradient: that of the product.
    Raises: ValueError, TypeError: shapes or dtypes that do not fit each other.
    """
    _check(*map(jax.typeof, (x, w)), skip_zeros=skip_zeros)
    return stacked_dot_p.bind(x, w, skip_zeros=skip_zeros)


def result_dtype(x) -> np.dtype:
    """dtype of a product of `x`: its own, or int32 for int8."""
    return jnp.dtype(jnp.int32) if x.dtype == jnp.int8 else x.dtype


def most_rows(dtype: Any) -> int:
    """Rows of one matrix above which XLA's product is the faster one (measured)."""
    if native.status().bfloat16 and dtype == jnp.bfloat16:
        return sys.maxsize
    return _MOST_ROWS.get(native.status().isa, {}).get(jnp.dtype(dtype).name, 24)


def kernel_serves(x, w) -> bool:
    """Whether the C++ kernel multiplies these dtypes on this machine."""
    if x.dtype != w.dtype:
        return False
    if x.dtype == jnp.int8:
        return native.status().isa != "scalar"
    return x.dtype in (jnp.float32, jnp.bfloat16)


def _reference(x, w, *, skip_zeros):
    lead = tuple(range(w.ndim - 2))
    contract = (((x.ndim - 1,), (w.ndim - 2,)), (lead, lead))
    return lax.dot_general(x, w, contract, preferred_element_type=result_dtype(x))


def _native(x, w, *, skip_zeros):
    lead, (inner, features) = w.shape[:-2], w.shape[-2:]
    stack, rows = math.prod(lead), math.prod(x.shape[len(lead) : -1])
    few = rows <= most_rows(x.dtype) or lead  # rows of a stack are mostly unused places
    if not (few and kernel_serves(x, w)) or min(stack, rows, inner, features) == 0:
        return _reference(x, w, skip_zeros=skip_zeros)
    starts = np.arange(stack, dtype=np.int32) * rows
    y = native.call(
        "cmjax_grouped_dot",
        jax.ShapeDtypeStruct((stack * rows, features), result_dtype(x)),
        x.reshape(stack * rows, inner),
        w.reshape(stack, inner, features),
        jnp.asarray(starts),
        jnp.full((stack,), rows, jnp.int32),
        skip_zeros=np.bool_(skip_zeros and bool(lead)),
    )
    return y.reshape(*x.shape[:-1], features)


def _check(x, w, *, skip_zeros):
    if w.ndim < 2 or x.ndim < w.ndim - 1:
        raise ValueError(
            f"stacked_dot: w must be [*stack, k, n] and x [*stack, rows, k], got w "
            f"{list(w.shape)} and x {list(x.shape)}"
        )
    stack = w.shape[:-2]
    if x.shape[: len(stack)] != stack or x.shape[-1] != w.shape[-2]:
        raise ValueError(
            f"stacked_dot: x must start with the stack {list(stack)} of w and end in its "
            f"{w.shape[-2]} inner elements, got {list(x.shape)}"
        )
    check_dtypes("stacked_dot", x, w)


def check_dtypes(what, x, w):
    """TypeError unless both are the same floating point, or int8."""
    if x.dtype != w.dtype or not (x.dtype == jnp.int8 or jnp.issubdtype(x.dtype, jnp.floating)):
        raise TypeError(
            f"{what}: x and w must be of one floating-point dtype, or both int8, got {x.dtype} "
            f"and {w.dtype}"
        )


def _batch(args, dims, **params):
    """Mapped rows are more rows: the matrix is read once. Mapped matrices are a stack."""
    x, w = args
    stack = w.ndim - 2
    if dims[1] is None:
        return stacked_dot_p.bind(jnp.moveaxis(x, dims[0], stack), w, **params), stack
    size = w.shape[dims[1]]
    w = jnp.moveaxis(w, dims[1], 0)
    x = jnp.broadcast_to(x, (size, *x.shape)) if dims[0] is None else jnp.moveaxis(x, dims[0], 0)
    return stacked_dot_p.bind(x, w, **params), 0


stacked_dot_p = define("cm_stacked_dot", _reference, check=_check, batch=_batch, native=_native)


@cost_rule(stacked_dot_p)
def _cost(x: Operand, w: Operand, *, out, skip_zeros, **_) -> Work:
    """That of `dot_general`: 2 M N K FLOP on the cube cores; zeros are multiplied there. Of a stack
    the kernel skips matrices without rows."""
    flops = out[0].size * x.shape[-1] * 2.0
    skipped = of_stack(x, w) if skip_zeros else {}
    return Work(flops=flops, **matmul_flops(x.dtype, flops, x.shape[-1]), **skipped)
