"""Price a program on a machine: a pure function of constants, sizes and load.

    timeline = price(program, machine, {"batch": 96.0, "context": 4096.0})

`jax.grad`, `jax.vmap` and `jax.jit` apply to it: machine constants and sizes are real numbers.
"""

import difflib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from cmjax.cost.engines import Seconds, seconds
from cmjax.cost.schedule import Ready, finish
from cmjax.cost.timeline import Timeline
from cmjax.hardware import Supernode
from cmjax.program import Program
from cmjax.program.size import evaluate_monomial


def price(
    program: Program,
    machine: Supernode,
    sizes: Mapping[str, ArrayLike],
    *,
    temperature: float = 0.0,
) -> Timeline:
    """Time of one run of `program`.

    Args:
      program: what to price (`cmjax.program.trace`).
      machine: where; its float leaves may be traced or batched values.
      sizes: a number for every symbol of the program. A one-dimensional array gives one value
        per iteration of the loops of that length (an expert load per layer); outside them its
        mean counts.
      temperature: 0 for the exact schedule; a positive number of seconds replaces every maximum
        by a log-sum-exp of that scale, an upper bound that is smooth for optimisers.
    Returns: a `Timeline`.
    Raises:
      ValueError: a missing or unknown size, or a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"price: temperature must be 0 or positive seconds, got {temperature}")
    values = {name: jnp.asarray(value, float) for name, value in sizes.items()}
    _check(program, values)
    streams = program.streams
    zero = jnp.zeros((1,))
    start = Ready(jnp.zeros((0, 1)), jnp.zeros((len(streams), 1)), zero)

    def run(periods):
        parts = _price_levels(program, machine, values, temperature, periods)
        durations = {level: part.total for level, part in parts.items()}
        after, spans = finish(program, durations, streams, start, zero, temperature)
        return parts, after, spans

    parts, after, spans = run({})
    if len(streams) > 1:
        # How much streams disturb one another depends on how far they overlap, which the
        # undisturbed schedule tells; one correction is enough.
        runs = _iterations(program)
        periods = {body: span / runs[body] for body, span in spans.items()}
        parts, after, spans = run(periods | {program: after.end[0]})
    levels = [level for level, _ in program.levels]
    spans |= {program: after.end[0]}
    return Timeline(
        total_s=after.end[0],
        parts=tuple(parts[level] for level in levels),
        spans=tuple(spans[level] for level in levels),
        program=program,
    )


def _iterations(program: Program) -> dict[Program, int]:
    """Length of every loop, by its body."""
    levels = [level for level, _ in program.levels]
    return {op.loop.body: op.loop.length for level in levels for op in level.operations if op.loop}


def _price_levels(program, machine, values, temperature, periods) -> dict[Program, Seconds]:
    """Seconds of every operation, for the program and the loops in it."""
    parts = {}

    def visit(level: Program, length: int | None) -> None:
        # A size with one value per iteration of this loop; elsewhere its mean counts.
        varying = {k for k, v in values.items() if v.ndim == 1 and v.shape[0] == length}
        here = {k: v if k in varying else jnp.mean(v) for k, v in values.items()}

        def one(here):
            table = _table(level, here)
            return seconds(level, table, machine, temperature, periods.get(level))

        axes = {k: 0 if k in varying else None for k in here}
        parts[level] = jax.vmap(one, in_axes=(axes,))(here) if varying else one(here)
        for op in level.operations:
            if op.loop is not None:
                visit(op.loop.body, op.loop.length)

    visit(program, None)
    return parts


def _table(program: Program, values):
    """Work of every operation, [operations, fields]: coefficients times monomials."""
    if not program.monomials:
        return jnp.zeros(program.coefficients.shape[1:])
    powers = [jnp.asarray(evaluate_monomial(m, values), float) for m in program.monomials]
    return jnp.tensordot(jnp.stack(powers), jnp.asarray(program.coefficients, float), axes=1)


def _check(program: Program, values) -> None:
    needed = program.symbols
    if missing := sorted(needed - set(values)):
        raise ValueError(f"price: no value for size {missing[0]!r}; needed: {sorted(needed)}")
    if unknown := sorted(set(values) - needed):
        close = difflib.get_close_matches(unknown[0], needed, n=1) or sorted(needed)
        raise ValueError(f"price: the program has no size {unknown[0]!r}; it has {close}")
    lengths = set(_iterations(program).values())
    for name, value in values.items():
        if value.ndim > 1 or (value.ndim == 1 and value.shape[0] not in lengths):
            raise ValueError(
                f"price: size {name!r} must be a number, or one per iteration of a loop (the "
                f"program's loops have {sorted(lengths)}); got shape {value.shape}"
            )
