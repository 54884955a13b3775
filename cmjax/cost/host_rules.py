"""NumPy's way of doing JAX's array arithmetic, operation by operation.

A rule takes the operation's inputs, and as keywords those of its parameters that it needs, which
`plain_parameters` gives as tuples, numbers, names and dtypes.
"""

import enum
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def plain_parameters(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that an operation's rule needs, free of JAX's own classes.

    Raises: KeyError where no rule is known.
    """
    rule = inspect.signature(RULES[name]).parameters.values()
    wanted = [parameter.name for parameter in rule if parameter.kind is parameter.KEYWORD_ONLY]
    # A gather's or a scatter's dimensions have names.
    dimensions = getattr(parameters.get("dimension_numbers"), "_asdict", dict)()
    known = {**parameters, **dimensions}
    found = {key: known[key] for key in wanted}
    return {key: v.name if isinstance(v, enum.Enum) else v for key, v in found.items()}


def _plain(operation: Callable) -> Callable:
    """A rule of an operation on arrays alone."""
    return lambda *inputs: operation(*inputs)


def _reduced(operation: Callable) -> Callable:
    return lambda x, *, axes: operation(x, axis=tuple(axes))


def _broadcast(x, *, shape, broadcast_dimensions):
    sizes = [1] * len(shape)
    for where, size in zip(broadcast_dimensions, x.shape, strict=True):
        sizes[where] = size
    return np.broadcast_to(x.reshape(sizes), shape)


def _slice(x, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, strides))]


def _dynamic_slice(x, *starts, slice_sizes):
    starts = np.clip(np.array(starts, int), 0, np.subtract(x.shape, slice_sizes))
    return x[tuple(slice(s, s + n) for s, n in zip(starts, slice_sizes, strict=True))]


def _dot(x, y, *, dimension_numbers, preferred_element_type):
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


def _gather(
    x, indices, *, slice_sizes, mode, fill_value, offset_dims, collapsed_slice_dims,
    start_index_map, operand_batching_dims, start_indices_batching_dims,
):  # fmt: skip
    """XLA's gather, slice by slice; a start outside is filled or moved inside, as `mode` says."""
    batch = indices.shape[:-1]
    dropped = (*collapsed_slice_dims, *operand_batching_dims)
    kept = [size for i, size in enumerate(slice_sizes) if i not in dropped]
    found = np.empty((*batch, *kept), x.dtype)
    for where in np.ndindex(*batch):
        start = np.zeros(x.ndim, int)
        start[list(start_index_map)] = indices[where]
        for i, j in zip(operand_batching_dims, start_indices_batching_dims, strict=True):
            start[i] = where[j]
        inside = np.clip(start, 0, np.subtract(x.shape, slice_sizes))
        if mode == "FILL_OR_DROP" and (inside != start).any():
            found[where] = np.nan if fill_value is None else fill_value
            continue
        start = inside
        part = x[tuple(slice(s, s + n) for s, n in zip(start, slice_sizes, strict=True))]
        found[where] = np.squeeze(part, dropped)
    return np.moveaxis(found, range(len(batch), found.ndim), offset_dims)


def _scatter_add(
    x, indices, updates, *, update_window_dims, inserted_window_dims, scatter_dims_to_operand_dims,
    operand_batching_dims, scatter_indices_batching_dims,
):  # fmt: skip
    """XLA's scatter with addition, the transpose of `_gather`; what falls outside is dropped."""
    batch = indices.shape[:-1]
    window = [i for i in range(updates.ndim) if i not in update_window_dims]
    updates = np.transpose(updates, (*window, *update_window_dims))
    dropped = (*inserted_window_dims, *operand_batching_dims)
    kept = iter(updates.shape[len(batch) :])
    sizes = [1 if i in dropped else next(kept) for i in range(x.ndim)]
    found = np.array(x)
    for where in np.ndindex(*batch):
        start = np.zeros(x.ndim, int)
        start[list(scatter_dims_to_operand_dims)] = indices[where]
        for i, j in zip(operand_batching_dims, scatter_indices_batching_dims, strict=True):
            start[i] = where[j]
        if (start >= 0).all() and (start + sizes <= x.shape).all():
            part = tuple(slice(s, s + n) for s, n in zip(start, sizes, strict=True))
            found[part] += updates[where].reshape(sizes)
    return found


def _pad(x, value, *, padding_config):
    """XLA's pad: negative amounts cut, interior ones spread the elements."""
    low, high, inside = (np.array(amounts, int) for amounts in zip(*padding_config, strict=True))
    spread = np.array([n + max(n - 1, 0) * i for n, i in zip(x.shape, inside, strict=True)], int)
    found = np.full(spread + np.maximum(low, 0) + np.maximum(high, 0), value, x.dtype)
    begin = np.maximum(low, 0)
    found[tuple(slice(b, b + n, i + 1) for b, n, i in zip(begin, spread, inside, strict=True))] = x
    cut = zip(np.maximum(-low, 0), found.shape, np.maximum(-high, 0), strict=True)
    return found[tuple(slice(a, n - b) for a, n, b in cut)]


RULES: dict[str, Callable] = {
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
    "integer_pow": lambda x, *, y: x**y,
    "convert_element_type": lambda x, *, new_dtype: x.astype(new_dtype),
    "select_n": lambda which, *cases: np.where(which, cases[1], cases[0]),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_or": _reduced(np.any),
    "reduce_and": _reduced(np.all),
    "reduce_sum": _reduced(np.sum),
    "broadcast_in_dim": _broadcast,
    "reshape": lambda x, *, new_sizes: x.reshape(new_sizes),
    "squeeze": lambda x, *, dimensions: np.squeeze(x, tuple(dimensions)),
    "expand_dims": lambda x, *, dimensions: np.expand_dims(x, tuple(dimensions)),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
    "rev": lambda x, *, dimensions: np.flip(x, tuple(dimensions)),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "concatenate": lambda *parts, dimension: np.concatenate(parts, dimension),
    "stack": lambda *parts, axis: np.stack(parts, axis),
    "unstack": lambda x, *, axis: list(np.moveaxis(x, axis, 0)),
    "iota": lambda *, dtype, shape, dimension: np.broadcast_to(
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
    "split": lambda x, *, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis),
}
