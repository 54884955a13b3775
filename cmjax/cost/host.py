"""A price on the host: the arithmetic of a traced function, run by NumPy.

One price is a few thousand operations on a handful of numbers each. XLA takes seconds to compile
them, NumPy milliseconds to run them; for thousands of prices at once, or gradients, `jax.jit` is
the other way. Values agree to rounding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.lax import GatherScatterMode


def on_host(fn: Callable) -> Callable:
    """`fn`, a JAX function of pytrees of arrays, run by NumPy.

    It is traced once for every shape of its arguments. Where JAX traces its arguments, or `fn` has
    an operation that is not array arithmetic, `jax.jit(fn)` runs instead.

    >>> import jax.numpy as jnp
    >>> on_host(lambda x: {"sum": jnp.sum(x * x)})(np.arange(4.0, dtype=np.float32))
    {'sum': np.float32(14.0)}
    """
    traced: dict[Any, tuple[ClosedJaxpr, Any]] = {}
    compiled = jax.jit(fn)

    @functools.wraps(fn)
    def run(*args):
        leaves, tree = jax.tree.flatten(args)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return compiled(*args)
        leaves = [np.asarray(leaf, jax.dtypes.result_type(leaf)) for leaf in leaves]
        key = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in traced:
            closed, out = jax.make_jaxpr(fn, return_shape=True)(*jax.tree.unflatten(tree, leaves))
            traced[key] = closed, jax.tree.structure(out)
        closed, out = traced[key]
        if not _is_arithmetic(closed.jaxpr):
            return compiled(*args)
        return jax.tree.unflatten(out, _run(closed.jaxpr, closed.consts, leaves))

    return run


def _is_arithmetic(jaxpr: Jaxpr) -> bool:
    """Whether NumPy can run it: all of its operations are in `_RULES`."""
    return all(
        _is_arithmetic(equation.params["jaxpr"].jaxpr)
        if equation.primitive.name == "jit"
        else equation.primitive.name in _RULES
        for equation in jaxpr.eqns
    )


def _run(jaxpr: Jaxpr, consts: Sequence, args: Sequence) -> list[np.ndarray]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    env |= zip(jaxpr.invars, args, strict=True)

    def read(atom):
        if isinstance(atom, Literal):
            return np.asarray(atom.val, atom.aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        return env[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if equation.primitive.name == "jit":
            inner = equation.params["jaxpr"]
            outs = _run(inner.jaxpr, inner.consts, inputs)
        else:
            outs = _RULES[equation.primitive.name](*inputs, **equation.params)
            outs = outs if equation.primitive.multiple_results else [outs]
        env.update(zip(equation.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _plain(operation: Callable) -> Callable:
    """A rule of an operation on arrays alone."""
    return lambda *inputs, **_: operation(*inputs)


def _reduced(operation: Callable) -> Callable:
    return lambda x, axes, **_: operation(x, axis=tuple(axes))


def _broadcast(x, *, shape, broadcast_dimensions, **_):
    sizes = [1] * len(shape)
    for where, size in zip(broadcast_dimensions, x.shape, strict=True):
        sizes[where] = size
    return np.broadcast_to(x.reshape(sizes), shape)


def _slice(x, *, start_indices, limit_indices, strides, **_):
    strides = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, strides))]


def _dynamic_slice(x, *starts, slice_sizes, **_):
    starts = np.clip(np.array(starts, int), 0, np.subtract(x.shape, slice_sizes))
    return x[tuple(slice(s, s + n) for s, n in zip(starts, slice_sizes, strict=True))]


def _dot(x, y, *, dimension_numbers, preferred_element_type, **_):
    (contract_x, contract_y), (batch_x, batch_y) = dimension_numbers
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    of_x = [next(letters) for _ in x.shape]
    of_y = [next(letters) for _ in y.shape]
    for i, j in (*zip(contract_x, contract_y, strict=True), *zip(batch_x, batch_y, strict=True)):
        of_y[j] = of_x[i]
    out = [of_x[i] for i in batch_x]
    out += [a for i, a in enumerate(of_x) if i not in {*contract_x, *batch_x}]
    out += [b for j, b in enumerate(of_y) if j not in {*contract_y, *batch_y}]
    found = np.einsum(f"{''.join(of_x)},{''.join(of_y)}->{''.join(out)}", x, y)
    return found if preferred_element_type is None else found.astype(preferred_element_type)


def _gather(x, indices, *, dimension_numbers, slice_sizes, mode, fill_value, **_):
    """XLA's gather, slice by slice; a start outside is filled or moved inside, as `mode` says."""
    d = dimension_numbers
    batch = indices.shape[:-1]
    dropped = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    kept = [size for i, size in enumerate(slice_sizes) if i not in dropped]
    found = np.empty((*batch, *kept), x.dtype)
    for where in np.ndindex(*batch):
        start = np.zeros(x.ndim, int)
        start[list(d.start_index_map)] = indices[where]
        for i, j in zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True):
            start[i] = where[j]
        inside = np.clip(start, 0, np.subtract(x.shape, slice_sizes))
        if mode is GatherScatterMode.FILL_OR_DROP and (inside != start).any():
            found[where] = np.nan if fill_value is None else fill_value
            continue
        start = inside
        part = x[tuple(slice(s, s + n) for s, n in zip(start, slice_sizes, strict=True))]
        found[where] = np.squeeze(part, dropped)
    return np.moveaxis(found, range(len(batch), found.ndim), d.offset_dims)


def _scatter_add(x, indices, updates, *, dimension_numbers, **_):
    """XLA's scatter with addition, the transpose of `_gather`; what falls outside is dropped."""
    d = dimension_numbers
    batch = indices.shape[:-1]
    window = [i for i in range(updates.ndim) if i not in d.update_window_dims]
    updates = np.transpose(updates, (*window, *d.update_window_dims))
    dropped = (*d.inserted_window_dims, *d.operand_batching_dims)
    kept = iter(updates.shape[len(batch) :])
    sizes = [1 if i in dropped else next(kept) for i in range(x.ndim)]
    found = np.array(x)
    for where in np.ndindex(*batch):
        start = np.zeros(x.ndim, int)
        start[list(d.scatter_dims_to_operand_dims)] = indices[where]
        for i, j in zip(d.operand_batching_dims, d.scatter_indices_batching_dims, strict=True):
            start[i] = where[j]
        if (start >= 0).all() and (start + sizes <= x.shape).all():
            part = tuple(slice(s, s + n) for s, n in zip(start, sizes, strict=True))
            found[part] += updates[where].reshape(sizes)
    return found


def _pad(x, value, *, padding_config, **_):
    """XLA's pad: negative amounts cut, interior ones spread the elements."""
    low, high, inside = (np.array(amounts, int) for amounts in zip(*padding_config, strict=True))
    spread = np.array([n + max(n - 1, 0) * i for n, i in zip(x.shape, inside, strict=True)], int)
    found = np.full(spread + np.maximum(low, 0) + np.maximum(high, 0), value, x.dtype)
    begin = np.maximum(low, 0)
    found[tuple(slice(b, b + n, i + 1) for b, n, i in zip(begin, spread, inside, strict=True))] = x
    cut = zip(np.maximum(-low, 0), found.shape, np.maximum(-high, 0), strict=True)
    return found[tuple(slice(a, n - b) for a, n, b in cut)]


_RULES: dict[str, Callable] = {
    "add": _plain(np.add),
    "add_any": _plain(np.add),
    "sub": _plain(np.subtract),
    "mul": _plain(np.multiply),
    "div": _plain(np.divide),
    "max": _plain(np.maximum),
    "min": _plain(np.minimum),
    "neg": _plain(np.negative),
    "exp": _plain(np.exp),
    "log": _plain(np.log),
    "sqrt": _plain(np.sqrt),
    "abs": _plain(np.abs),
    "pow": _plain(np.power),
    "eq": _plain(np.equal),
    "ne": _plain(np.not_equal),
    "lt": _plain(np.less),
    "le": _plain(np.less_equal),
    "gt": _plain(np.greater),
    "ge": _plain(np.greater_equal),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "not": _plain(np.invert),
    "stop_gradient": _plain(lambda x: x),
    "integer_pow": lambda x, y: x**y,
    "convert_element_type": lambda x, new_dtype, **_: x.astype(new_dtype),
    "select_n": lambda which, *cases: np.where(which, cases[1], cases[0]),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_or": _reduced(np.any),
    "reduce_and": _reduced(np.all),
    "reduce_sum": _reduced(np.sum),
    "broadcast_in_dim": _broadcast,
    "reshape": lambda x, new_sizes, **_: x.reshape(new_sizes),
    "squeeze": lambda x, dimensions: np.squeeze(x, tuple(dimensions)),
    "expand_dims": lambda x, dimensions: np.expand_dims(x, tuple(dimensions)),
    "transpose": lambda x, permutation: np.transpose(x, permutation),
    "rev": lambda x, dimensions: np.flip(x, tuple(dimensions)),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "concatenate": lambda *parts, dimension: np.concatenate(parts, dimension),
    "stack": lambda *parts, axis, **_: np.stack(parts, axis),
    "unstack": lambda x, axis, **_: list(np.moveaxis(x, axis, 0)),
    "iota": lambda dtype, shape, dimension, **_: np.broadcast_to(
        np.arange(shape[dimension], dtype=dtype).reshape(
            [-1 if i == dimension else 1 for i in range(len(shape))]
        ),
        shape,
    ),
    "dot_general": _dot,
    "gather": _gather,
    "scatter-add": _scatter_add,
    "pad": _pad,
    "square": _plain(np.square),
    "split": lambda x, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis),
}
