"""A step that is ready to be traced, and what a user calls its sizes."""

import dataclasses
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from cmjax.hardware import Supernode
from cmjax.program.operation import Program
from cmjax.program.shapes import annotated_arguments, parameters_of
from cmjax.program.size import Size
from cmjax.program.tiers import Tiers
from cmjax.program.trace import trace

_BY_NAME = inspect.Parameter.KEYWORD_ONLY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a workload.

    Fields:
      fn: the function to trace; its collectives run under its own `shard_map`.
      args: abstract arguments, dimensions possibly symbolic.
      sizes: maps what a user gives (its keyword parameters, by name) to the program's symbols;
        parameters with defaults are optional. Must be differentiable, and raise ValueError for
        sizes that make no sense, such as ones that do not divide.
      weight_bytes, state_bytes: HBM of one rank for parameters, and for inputs and caches.
    """

    fn: Callable
    args: tuple
    sizes: Callable[..., Mapping[str, Any]]
    weight_bytes: Size | float = 0.0
    state_bytes: Size | float = 0.0

    def trace(
        self,
        at: Mapping[str, float] | None = None,
        *,
        tiers: Tiers | None = None,
        machine: Supernode | None = None,
    ) -> Program:
        """Read the step as a program; `at` are values of its symbols, the rest as in `trace`."""
        return trace(self.fn, *self.args, at=at, tiers=tiers, machine=machine)

    def symbols(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The program's symbols at the sizes `given`; ValueError names a missing or unknown one."""
        parameters = inspect.signature(self.sizes).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return self.sizes(**given)
        if unknown := sorted(set(given) - set(parameters)):
            close = get_close_matches(unknown[0], parameters, n=1) or list(parameters)
            raise ValueError(f"unknown size {unknown[0]!r}; this step takes {', '.join(close)}")
        needed = [n for n, p in parameters.items() if p.default is p.empty]
        if missing := sorted(set(needed) - set(given)):
            raise ValueError(
                f"size {missing[0]!r} is needed; this step takes {', '.join(parameters)}"
            )
        return self.sizes(**given)


def import_from_here(module_name: str) -> ModuleType:
    """Import a module, also from the working folder, which a console script does not search."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(module_name)


def load_function(target: str) -> Callable:
    """Find what `module:function` names, from the working folder too.

    Raises: ValueError: no such module or function (with the closest names).
    """
    module_name, colon, name = target.partition(":")
    if module_name.endswith(".py"):
        named = ".".join(Path(module_name).with_suffix("").parts)
        raise ValueError(f"program {target!r}: expected module:function, as in {named}:{name}")
    if not colon or not name or not all(map(str.isidentifier, module_name.split("."))):
        raise ValueError(f"program {target!r}: expected module:function")
    try:
        module = import_from_here(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise ValueError(f"program {target!r}: {module_name} needs {error.name!r}") from None
        raise ValueError(
            f"program {target!r}: no module {error.name!r}{_closest_module(module_name)} "
            f"(looked from {os.getcwd()})"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        public = [n for n, f in vars(module).items() if callable(f) and not n.startswith("_")]
        close = get_close_matches(name, public, n=3) or public[:5]
        raise ValueError(
            f"program {target!r}: {module_name} has no function {name!r}; it has {', '.join(close)}"
        )
    return function


def step_of(
    function: Callable,
    machine: Supernode,
    name: str,
    *,
    args: tuple | None = None,
    static: Mapping[str, Any] | None = None,
) -> Step:
    """Make a function a step.

    Args:
      function: a step builder (it takes a machine and its return annotation is `Step` or a
        subclass), or any JAX function: every name in the shape of an argument becomes a size.
      machine: what a builder builds for.
      name: what to call the function in an error.
      args: abstract arguments of a JAX function; `None` reads them from its jaxtyping annotations,
        such as `x: BFloat16[Array, "tokens 7168"]`.
      static: arguments with fixed values, by name.
    Raises:
      ValueError: unreadable annotations, or a static argument that the function does not take.
    """
    static = dict(static or {})
    parameters = parameters_of(function)
    if unknown := sorted(set(static) - set(parameters)):
        close = get_close_matches(unknown[0], parameters, n=1) or list(parameters)
        raise ValueError(
            f"program {name!r}: no parameter {unknown[0]!r} to fix; it takes {', '.join(close)}"
        )
    if builds_step(function):
        return cast(Step, function(machine, **static))
    if args is None:
        named = annotated_arguments(function, name, static)
        names, args = list(named), tuple(named.values())
    else:
        names = [p for p in parameters if p not in static][: len(args)]
    # Called by position where that is the same, as a function of any arguments (`*xs`) must be.
    in_order = list(parameters)[: len(names)] == names
    if not static and in_order and all(parameters[n].kind is not _BY_NAME for n in names):
        return Step(fn=function, args=args, sizes=_as_given)

    def bound(*arrays):
        return function(**dict(zip(names, arrays, strict=True)), **static)

    return Step(fn=bound, args=args, sizes=_as_given)


def builds_step(function: Callable) -> bool:
    """Whether a function takes a machine and returns a `Step`, by its annotation."""
    try:
        returned = typing.get_type_hints(function).get("return")
    except (NameError, TypeError):  # annotations that only a type checker can read
        return False
    return isinstance(returned, type) and issubclass(returned, Step)


def _as_given(**sizes):
    return sizes


def _closest_module(module_name: str) -> str:
    folder, _, last = module_name.rpartition(".")
    try:
        path = importlib.import_module(folder).__path__ if folder else [os.getcwd()]
    except (ModuleNotFoundError, AttributeError):
        return ""
    found = {f.removesuffix(".py") for p in path for f in os.listdir(p) if not f.startswith("_")}
    close = get_close_matches(last, found, n=2)
    return (
        f"; closest: {', '.join(f'{folder}.{c}' if folder else c for c in close)}" if close else ""
    )
