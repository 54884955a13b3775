"""A price on the host: the arithmetic of a traced function, run by NumPy.

One price is a few thousand operations on a handful of numbers each. XLA takes seconds to compile
them, NumPy milliseconds to run them; for thousands of prices at once, or gradients, `jax.jit` is
the other way. Values agree to rounding.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal

from cmjax.cost.host_rules import RULES, plain_parameters

Keep = Callable[[tuple, Callable[[], Any]], Any]
"""`keep(key, make)` is what `make()` gives, now or in an earlier run."""


@dataclass(frozen=True)
class Recorded:
    """What a function does with arguments of one shape: operations on numbered values.

    Values are the arguments' leaves and then the results, in order; a negative number is that of a
    constant, counted from -1 down.

    Attributes:
      constants: the numbers that the function brings along.
      operations: the rule's name, the values it takes, its parameters, and whether it has several
        results.
      out: the function's result, with the number of a value in place of each leaf.
    """

    constants: tuple[np.ndarray, ...]
    operations: tuple[tuple[str, tuple[int, ...], dict[str, Any], bool], ...]
    out: Any

    def __call__(self, leaves: Sequence[np.ndarray]) -> Any:
        """The function's result for the leaves of its arguments."""
        values: list[Any] = list(leaves)

        def read(number: int) -> np.ndarray:
            return values[number] if number >= 0 else self.constants[~number]

        for name, inputs, parameters, several in self.operations:
            found = RULES[name](*map(read, inputs), **parameters)
            values.extend(found if several else [found])
        return jax.tree.map(read, self.out)


def on_host(fn: Callable, keep: Keep | None = None) -> Callable:
    """`fn`, a JAX function of pytrees of arrays, run by NumPy.

    It is traced once for every shape of its arguments. Where JAX traces its arguments, or `fn` has
    an operation that is not array arithmetic, `jax.jit(fn)` runs instead.

    Args:
      fn: the function.
      keep: holds on to what tracing found beyond this run.

    >>> import jax.numpy as jnp
    >>> on_host(lambda x: {"sum": jnp.sum(x * x)})(np.arange(4.0, dtype=np.float32))
    {'sum': np.float32(14.0)}
    """
    recorded: dict[Any, Recorded | None] = {}
    compiled = jax.jit(fn)

    @functools.wraps(fn)
    def run(*args):
        leaves, tree = jax.tree.flatten(args)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return compiled(*args)
        leaves = [np.asarray(leaf, jax.dtypes.result_type(leaf)) for leaf in leaves]
        key = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)

        def record():
            return _record(fn, jax.tree.unflatten(tree, leaves))

        if key not in recorded:
            recorded[key] = record() if keep is None else keep(key, record)
        found = recorded[key]
        return compiled(*args) if found is None else found(leaves)

    return run


def _record(fn: Callable, args: Sequence) -> Recorded | None:
    """What `fn` does with such arguments; None if it is more than array arithmetic."""
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    if not _is_arithmetic(closed):
        return None
    constants: dict[tuple, tuple[int, np.ndarray]] = {}
    operations: list[tuple[str, tuple[int, ...], dict[str, Any], bool]] = []
    values = itertools.count(len(closed.in_avals))

    def constant(value) -> int:
        value = np.asarray(value)
        key = value.dtype.str, value.shape, value.tobytes()
        return ~constants.setdefault(key, (len(constants), value))[0]

    def walk(closed: ClosedJaxpr, inputs: Sequence[int]) -> list[int]:
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.constvars, map(constant, closed.consts), strict=True))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom) -> int:
            return constant(_value(atom)) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            name, inputs = equation.primitive.name, tuple(map(read, equation.invars))
            if name == "jit":
                results = walk(equation.params["jaxpr"], inputs)
            else:
                parameters = plain_parameters(name, equation.params)
                operations.append((name, inputs, parameters, equation.primitive.multiple_results))
                results = list(itertools.islice(values, len(equation.outvars)))
            known |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    results = walk(closed, range(len(closed.in_avals)))
    out = jax.tree.unflatten(jax.tree.structure(out), results)
    return Recorded(tuple(value for _, value in constants.values()), tuple(operations), out)


def _value(atom: Literal) -> np.ndarray:
    return np.asarray(atom.val, atom.aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def _is_arithmetic(closed: ClosedJaxpr) -> bool:
    """Whether NumPy can run it: all of its operations are in `RULES`."""
    return all(
        _is_arithmetic(equation.params["jaxpr"])
        if equation.primitive.name == "jit"
        else equation.primitive.name in RULES
        for equation in closed.jaxpr.eqns
    )
