"""Trace a JAX function once, with symbolic sizes, into a program of priced operations.

The jaxpr is walked down through jit, shard_map, custom derivatives, remat, cond and while; a scan
becomes one `Loop` over its body, so a program does not grow with depth. Element-wise chains are
merged into kernels (`fuse.py`), so that HBM is charged once per chain.

A program is what *one rank* does. Inside a `shard_map` arrays are what a rank holds of them; what
stands outside is priced as done by every rank, whole.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import jax

from cmjax.hardware import Supernode
from cmjax.program.operation import Program
from cmjax.program.shapes import (
    SymbolicSize,
    needs_numbers,
    symbols_in,
    whole_number,
    with_numbers,
)
from cmjax.program.tiers import Axes, Tiers
from cmjax.program.walk import walk


def trace(
    fn: Callable,
    *args,
    axis_sizes: Mapping[str, int] | None = None,
    tiers: Tiers | None = None,
    machine: Supernode | None = None,
    at: Mapping[str, float] | None = None,
) -> Program:
    """Read `fn` as a program to price; nothing is allocated or run.

    Args:
      fn: a JAX function of one rank, or a `shard_map` of one.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`s; dimensions may be symbolic
        (`jax.export.symbolic_shape`).
      axis_sizes: sizes of the mesh axes that `fn` names outside any `shard_map`.
      tiers: mesh axis -> the link tier its ranks lie on (`"die"`, `"node"`, `"supernode"`), or how
        many of them lie on which. Axes named `die`, `npu` and `node` need none.
      machine: lays the axes of which nothing else says where they lie, row-major (`tiers.py`); the
        fused kernels that its serving engine does not have are taken apart (`Engine.unfused`).
      at: sizes at which kernels and branches are chosen where that depends on them; a symbol
        without one counts as 1024. A size that the function needs as a number (it is the length of
        a scan, or Python asks how large it is) is taken from here too, and is then no symbol of
        the program.
    Raises:
      UnpricedPrimitive: a primitive without cost rule, with its name and how to register one.
      SymbolicSize: the function needs a size as a number, and `at` has none; a `while` without
        declared trip count.
      ValueError: a collective or loop inside a fused kernel; a collective over an axis of which
        nothing says where it lies.

    >>> import jax.numpy as jnp
    >>> (n,) = jax.export.symbolic_shape("n")
    >>> program = trace(lambda x: jnp.tanh(x) * 2, jax.ShapeDtypeStruct((n, 64), jnp.float32))
    >>> program.totals({"n": 1000})["read_bytes"]
    256000.0
    """
    inputs, numbers = symbols_in(args), dict(at or {})
    unfused = machine.running().unfused if machine else ()
    fixed: dict[str, int] = {}
    while True:
        try:
            closed = _jaxpr(fn, with_numbers(args, fixed), axis_sizes)
            axes = Axes(axis_sizes or {}, tiers, machine)
            program = _program(closed.jaxpr, axes, numbers, unfused)
            break
        except SymbolicSize as error:
            wanted = (error.symbols or inputs) - set(fixed)
            if not wanted or not wanted <= set(numbers):
                raise
            fixed |= {name: whole_number(name, numbers[name]) for name in sorted(wanted)}
    return dataclasses.replace(program, inputs=inputs)


def _jaxpr(fn: Callable, args: tuple, axis_sizes: Mapping[str, int] | None):
    try:
        return jax.make_jaxpr(fn, axis_env=list((axis_sizes or {}).items()))(*args)
    except Exception as error:
        if symbols_in(args) and needs_numbers(error):
            reason = str(error).splitlines()[0].rstrip(".")
            raise SymbolicSize(f"the program needs its sizes as numbers: {reason}") from error
        raise


def _program(
    jaxpr, axes: Axes, at: Mapping[str, float] | None, unfused: Collection[str]
) -> Program:
    program, choices, seen = walk(jaxpr, axes, at, unfused)
    if unknown := sorted(set(axes.tiers) - seen):
        known = f"its axes are {', '.join(sorted(seen))}" if seen else "it has none"
        raise ValueError(f"tiers: the program has no mesh axis {unknown[0]!r}; {known}")
    return dataclasses.replace(
        program,
        assumed=tuple(choices.assumed),
        retrace=lambda sizes: _program(jaxpr, axes, sizes, unfused),
    )
