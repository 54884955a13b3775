"""Abstract arguments, and the symbols in their shapes.

The shape of an argument may hold symbols (`jax.export.symbolic_shape`), also read from jaxtyping
annotations: `x: BFloat16[Array, "tokens 7168"]` has the symbol `tokens`.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from cmjax.program.size import Size

_DIMENSION = re.compile(r"[A-Za-z(\d][\w+\-*/()]*")


class SymbolicSize(ValueError):
    """A program needs a size as a number while it is traced: a loop's length, a Python branch.

    `symbols` are the sizes that would have to be numbers; empty if it is not known which.
    """

    def __init__(self, message: str, symbols: frozenset[str] = frozenset()):
        super().__init__(message)
        self.symbols = symbols


def needs_numbers(error: Exception) -> bool:
    """Whether JAX failed because a dimension is a symbol."""
    words = ("_DimExpr", "non-constant size", "symbolic dimension", "to be static")
    return isinstance(error, jax.errors.InconclusiveDimensionOperation) or any(
        word in str(error) for word in words
    )


def symbols_in(args: Any) -> frozenset[str]:
    """Symbols in the shapes of a pytree of (abstract) arrays."""
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(args)]
    return frozenset().union(*(Size.of(d).symbols() for shape in shapes for d in shape))


def with_numbers(args: Any, numbers: Mapping[str, int]) -> Any:
    """The arguments with some of their symbols replaced by numbers."""
    if not numbers:
        return args

    def replaced(leaf):
        if not symbols_in(leaf) & set(numbers):
            return leaf
        return jax.ShapeDtypeStruct([_dimension(d, numbers) for d in leaf.shape], leaf.dtype)

    return jax.tree.map(replaced, args)


def whole_number(name: str, value: float) -> int:
    """A size that a program needs as a number; ValueError if it is none."""
    if value != round(value) or value < 0:
        raise ValueError(
            f"size {name!r} must be a whole number, as the program's loops or branches depend on "
            f"it; got {value:g}"
        )
    return round(value)


def _dimension(dimension, numbers: Mapping[str, int]):
    size = Size.of(dimension).fix(numbers)
    if size.constant is not None:
        return math.floor(size.constant)
    text = re.sub(
        r"[A-Za-z_]\w*", lambda found: str(numbers.get(found[0], found[0])), str(dimension)
    )
    return jax.export.symbolic_shape(text, scope=dimension.scope)[0]


def annotated_arguments(
    function: Callable, name: str, static: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract arguments from jaxtyping annotations; shape names become symbolic dimensions.

    Args:
      function: its parameters carry jaxtyping shapes, or have defaults.
      name: what to call it in an error.
      static: arguments that are given, by name.
    """
    shapes: dict[str, tuple[str, Any]] = {}
    for parameter in parameters_of(function).values():
        if parameter.name in static:
            continue
        annotation = parameter.annotation
        if parameter.default is not parameter.empty and not hasattr(annotation, "dim_str"):
            continue
        if not hasattr(annotation, "dim_str") or len(annotation.dtypes) == 0:
            raise ValueError(
                f"program {name!r}: parameter {parameter.name!r} needs a jaxtyping shape, such "
                f'as BFloat16[Array, "tokens 7168"], so that it can be traced, or a value (static)'
            )
        text = _dimensions(annotation.dim_str, f"program {name!r}: parameter {parameter.name!r}")
        shapes[parameter.name] = text, _dtype(annotation.dtypes)
    shape_names = sorted(
        {n for text, _ in shapes.values() for n in re.findall(r"[A-Za-z_]\w*", text)}
    )
    scope = jax.export.SymbolicScope()
    if shape_names:
        jax.export.symbolic_shape(",".join(shape_names), scope=scope)
    return {
        argument: jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(text, scope=scope) if text else (), dtype
        )
        for argument, (text, dtype) in shapes.items()
    }


def parameters_of(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Parameters of a function, their annotations evaluated; none where it does not tell."""
    try:
        return inspect.signature(function, eval_str=True).parameters
    except (NameError, SyntaxError):  # annotations that only a type checker can read
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function not written in Python
        return {}


def _dimensions(text: str, where: str) -> str:
    """A jaxtyping shape as JAX reads it: `"heads=8 tokens"` is `8,tokens`."""
    dimensions = [word.rpartition("=")[2] for word in text.split()]
    if bad := [word for word in dimensions if not _DIMENSION.fullmatch(word)]:
        raise ValueError(
            f"{where} has the axis {bad[0]!r} in its shape {text!r}; to be traced, every axis "
            "needs a name, a number or an expression of them"
        )
    return ",".join(dimensions)


def _dtype(names: Any) -> Any:
    """The one dtype of an annotation; for families such as Float the JAX default of that kind."""
    if len(names) == 1:
        return jnp.dtype(names[0])
    return jnp.dtype("int32" if all("int" in n for n in names) else "float32")
