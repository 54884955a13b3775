"""Annotations held against every call that the tests make: shapes and dtypes, in and out.

A function that refuses its arguments speaks for itself, so a call is checked once it has returned:
whatever a public function accepts, and whatever it gives back, must be as its signature says, with
one size for every name. Results that are dataclasses or named tuples are checked field by field.
NumPy arrays count as arrays. Of calls with the same types, shapes and dtypes a process checks one:
checking is dearer than tracing.
"""

import dataclasses
import functools
import importlib.abc
import importlib.machinery
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped

_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int serves as a float


class AnnotationHook(importlib.abc.MetaPathFinder):
    """Checks the public functions of `packages`, from when their modules are first imported.

    Fields:
      packages: dotted names; modules below them are checked too.
      but: modules among them that are not.
    """

    def __init__(self, packages: tuple[str, ...], but: tuple[str, ...] = ()):
        self.packages = packages
        self.but = but

    def find_spec(self, fullname, path, target=None):
        if fullname in self.but:
            return None
        if not any(fullname == p or fullname.startswith(p + ".") for p in self.packages):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            check_module(module)

        spec.loader.exec_module = exec_module
        return spec


def install(packages: tuple[str, ...], but: tuple[str, ...] = ()) -> None:
    """Check these packages from now on; none of their modules may have been imported."""
    early = [name for name in sys.modules if name.startswith(packages)]
    assert not early, f"imported before the annotation hook: {early}"
    sys.meta_path.insert(0, AnnotationHook(packages, but))


def check_module(module: Any) -> None:
    """Replace the public functions that `module` defines by checked ones."""
    for name, value in list(vars(module).items()):
        own = getattr(value, "__module__", None) == module.__name__
        function = callable(value) and hasattr(value, "__name__") and not inspect.isclass(value)
        if own and function and not name.startswith("_"):
            setattr(module, name, checked(value))


def checked(function: Callable) -> Callable:
    """`function`, whose accepted calls are held against its annotations."""
    if inspect.isgeneratorfunction(inspect.unwrap(function)):
        return (
            function  # it makes an iterator or a context manager, and its annotation says what of
        )
    results: list[Any] = []
    seen: set[int] = set()

    @functools.wraps(function)
    def replay(*args, **kwargs):
        return results[-1]

    replay = jaxtyped(replay, typechecker=_typechecker)

    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        leaves = jax.tree.leaves((args, kwargs, result), is_leaf=_is_closed)
        if any(map(_has_symbolic_size, leaves)):
            return result  # jaxtyping compares whole numbers
        kind = hash(tuple(map(_kind, (*args, *kwargs, *kwargs.values(), result, *leaves))))
        if kind in seen:
            return result
        seen.add(kind)
        results.append(result)
        state = random.getstate()  # beartype draws the entries that it looks at
        try:
            replay(*args, **kwargs)
        except TypeCheckError:
            results.append(_as_array(result))
            replay(*map(_as_array, args), **{name: _as_array(a) for name, a in kwargs.items()})
        finally:
            results.clear()
            random.setstate(state)
        check_fields(result)
        return result

    return call


def check_fields(record: Any) -> None:
    """Hold a dataclass or named tuple of arrays against the annotations of its fields."""
    kind = type(record)
    if kind.__module__.startswith("optax."):
        return  # a transformation: its fields are protocols, which say nothing at run time
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        names = (
            [f.name for f in dataclasses.fields(kind)]
            if dataclasses.is_dataclass(kind)
            else (kind._fields)
        )
        values = {name: getattr(record, name) for name in names}
        try:
            _fields_checker(kind)(**values)
        except TypeCheckError:
            _fields_checker(kind)(**{name: _as_array(value) for name, value in values.items()})


@functools.cache
def _fields_checker(kind: type) -> Callable:
    def fields(**_):
        return None

    signature = inspect.signature(kind)
    fields.__signature__ = signature.replace(return_annotation=Any)
    fields.__qualname__ = kind.__qualname__
    return jaxtyped(fields, typechecker=_typechecker)


def _is_closed(value: Any) -> bool:
    """Not to be looked into: an iterator is used up, and JAX sorts the keys of a dictionary."""
    return isinstance(value, Iterator) or (
        isinstance(value, dict) and not all(isinstance(key, str) for key in value)
    )


def _kind(value: Any) -> Any:
    """What annotations can tell of a value: a word itself, else its type, shape and dtype."""
    if isinstance(value, str):
        return value
    return type(value), str(getattr(value, "shape", "")), str(getattr(value, "dtype", ""))


def _has_symbolic_size(leaf: Any) -> bool:
    shape = () if inspect.isclass(leaf) else getattr(leaf, "shape", ())
    return any(not isinstance(size, int) for size in shape)


def _as_array(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return jnp.asarray(value)
    return value
