"""Price any JAX function: find its program, choose its kernels at the sizes given, price it.

    timeline = price_function(my_fn, machine, tokens=4096)

A function is traced once; what is traced is kept, so a second price costs only arithmetic.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike

from cmjax.cost.host import on_host
from cmjax.cost.price import check_sizes, price
from cmjax.cost.timeline import Timeline
from cmjax.hardware import Supernode
from cmjax.program import Program, SymbolicSize, Tiers
from cmjax.program.step import Step, builds_step, load_function, step_of

_KEPT = 64
"""Functions whose programs are kept, and programs of one function that differ by its sizes."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A program and the numbers of its symbols: what `price` takes."""

    program: Program
    symbols: dict[str, Any]


def price_function(
    fn: Callable | Step | str,
    machine: Supernode,
    /,
    *,
    args: tuple | None = None,
    static: Mapping[str, Any] | None = None,
    tiers: Tiers | None = None,
    temperature: float = 0.0,
    **sizes: ArrayLike,
) -> Timeline:
    """Time, FLOP and bytes of one run of a JAX function on a machine; nothing is run.

    `jax.jit`, `jax.grad` and `jax.vmap` apply to it, in the machine's constants and in the sizes.

    Args:
      fn: a function whose parameters carry jaxtyping shapes (every name in a shape is a size), a
        `Step`, a function that builds a `Step` for a machine, or any of them as
        `"module:function"`.
      machine: where it runs; float leaves may be traced or batched values.
      args: abstract arguments (arrays or `jax.ShapeDtypeStruct`s, dimensions possibly symbolic)
        of a function without annotations.
      static: arguments with fixed values, by name.
      tiers: mesh axis -> link tier of a sharded function, as in `cmjax.program.trace`. An axis
        of which nothing is said is laid on the machine row-major, as JAX numbers devices.
      temperature: as in `price`.
      **sizes: a number for every size, or an array with one per iteration of a loop. (Sizes named
        like an argument above are given to `cmjax.cost.price`.)
    Returns: a `Timeline`.
    Raises:
      ValueError: a size missing, unknown or, where a loop's length hangs on it, traced or not
        whole; a parameter without a shape; and all that `trace` and `price` raise.

    Which operations fuse, and which branch of a `cond` is charged, is chosen at the sizes given.
    Where they are traced values, which no choice can be made at, it is at 1024 for each.

    >>> import jax, jax.numpy as jnp
    >>> from jaxtyping import Array, BFloat16
    >>> from cmjax.hardware import load_machine
    >>> def project(x: BFloat16[Array, "tokens 7168"], w: BFloat16[Array, "7168 4096"]):
    ...     return x @ w
    >>> machine = load_machine("cloudmatrix384")
    >>> timeline = price_function(project, machine, tokens=4096)
    >>> f"{float(timeline.flops):.3g} FLOP in {float(timeline.total_s) * 1e3:.1f} ms"
    '2.41e+11 FLOP in 0.8 ms'
    >>> slope = jax.grad(lambda n: price_function(project, machine, tokens=n).total_s)(4096.0)
    """
    found = prepare(fn, machine, sizes, args=args, static=static, tiers=tiers)
    check_sizes(found.program, found.symbols)
    return jax.tree.map(jnp.asarray, _pricer(found.program, temperature)(machine, found.symbols))


def prepare(
    fn: Callable | Step | str,
    machine: Supernode,
    sizes: Mapping[str, ArrayLike],
    *,
    args: tuple | None = None,
    static: Mapping[str, Any] | None = None,
    tiers: Tiers | None = None,
) -> Prepared:
    """The program of a function at some sizes, as `price_function` prices it; same arguments."""
    name = fn if isinstance(fn, str) else getattr(fn, "__name__", type(fn).__name__)
    if isinstance(fn, str):
        fn = load_function(fn)
    programs = _programs(fn, machine, name, args, static, tiers)
    symbols = dict(programs.step.symbols(sizes))
    numbers = {
        size: float(np.mean(np.asarray(value)))
        for size, value in symbols.items()
        if not isinstance(value, Tracer)
    }
    return Prepared(programs.at(numbers), symbols)


@functools.lru_cache(maxsize=_KEPT)
def _pricer(program: Program, temperature: float) -> Callable:
    """`price` as a function of the machine and the sizes, made ready once."""
    return on_host(
        lambda machine, symbols: price(program, machine, symbols, temperature=temperature)
    )


class _Programs:
    """Programs of one step: one for all sizes, if there is such a one, and others by sizes."""

    def __init__(self, step: Step, machine: Supernode, tiers: Tiers | None):
        # Of the machine only its shape is used; its constants may be values of a trace.
        shape = jax.tree.map(lambda _: 0.0, machine)
        self.step = step
        self._trace = functools.partial(step.trace, machine=shape, tiers=tiers)
        self._at = functools.lru_cache(maxsize=_KEPT)(lambda numbers: self._trace(dict(numbers)))
        self._missing: SymbolicSize | None = None
        self._for_all: Program | None = None
        try:
            self._for_all = self._trace()
        except SymbolicSize as error:
            self._missing = error

    def at(self, numbers: Mapping[str, float]) -> Program:
        if self._for_all is not None and not self._for_all.broken_assumptions(numbers):
            return self._for_all
        if self._missing is not None and not self._missing.symbols <= set(numbers):
            raise self._missing
        return self._at(tuple(sorted(numbers.items())))


def _programs(
    fn: Callable | Step, machine: Supernode, name: str, args, static, tiers: Tiers | None
) -> _Programs:
    """What is known of a function, once for each of the last `_KEPT`; a key without a hash, such
    as one with arrays or traced values in it, is not kept."""
    if isinstance(fn, Step):
        who, constants = (fn.fn, fn.sizes), ()
        args = fn.args
    else:
        who, constants = fn, tuple(jax.tree.leaves(machine)) if builds_step(fn) else ()
    said = {
        axis: tier if isinstance(tier, str) else tuple(tier.items())
        for axis, tier in (tiers or {}).items()
    }
    arguments, structure = jax.tree.flatten(args)
    shape = jax.tree.structure(machine)  # its name and counts
    key = (who, constants, tuple(arguments), structure, _items(static), _items(said), shape)
    try:
        if key in _KNOWN:
            return _KNOWN[key]
    except TypeError:
        key = None
    step = fn if isinstance(fn, Step) else step_of(fn, machine, name, args=args, static=static)
    made = _Programs(step, machine, tiers)
    if key is not None:
        while len(_KNOWN) >= _KEPT:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = made
    return made


_KNOWN: dict[Hashable, _Programs] = {}


def _items(named: Mapping[str, Any] | None) -> tuple:
    return tuple(sorted((named or {}).items(), key=lambda item: item[0]))
