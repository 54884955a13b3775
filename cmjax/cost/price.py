"""Price a program on a machine: a pure function of constants, sizes and load.

    timeline = price(program, machine, {"batch": 96.0, "context": 4096.0})

`jax.grad`, `jax.vmap` and `jax.jit` apply to it: machine constants and sizes are real numbers.
"""

import difflib
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from cmjax.cost.engines import Seconds, seconds
from cmjax.cost.fabric import Work
from cmjax.cost.schedule import Ready, Times, finish
from cmjax.cost.timeline import Timeline
from cmjax.cost.waiting import NONE, Differences
from cmjax.hardware import Supernode
from cmjax.program import FIELDS, Loop, Program
from cmjax.program.size import evaluate_monomial


class SizesApart(UserWarning):
    """A program is priced at sizes for which it would have been put together otherwise."""


def price(
    program: Program,
    machine: Supernode,
    sizes: Mapping[str, ArrayLike],
    *,
    temperature: float = 0.0,
    differences: Differences = NONE,
) -> Timeline:
    """Time of one run of `program`.

    Args:
      program: what to price (`cmjax.program.trace`).
      machine: where; its float leaves may be traced or batched values.
      sizes: a number for every symbol of the program. A one-dimensional array gives one value
        per iteration of the loops of that length (an expert load per layer), in the loops inside
        such a loop too; outside them its mean counts. A symbol of an argument's shape that no
        work depends on may be given as well.
      temperature: 0 for the exact schedule; a positive number of seconds replaces every maximum
        by a log-sum-exp of that scale, an upper bound that is smooth for optimisers.
      differences: between the ranks' work, beyond jitter (`cmjax.cost.waiting`).
    Returns: a `Timeline`.
    Raises:
      ValueError: a missing or unknown size, or a negative temperature.
    Warns:
      SizesApart: what the program fuses, or which branch it charges, was chosen for sizes that
        differ from these so far that another choice would be made here. It can only be told where
        sizes are numbers, not under `jit`, `grad` or `vmap`; `program.decided_at(sizes)` is the
        program with the other choices.
    """
    if temperature < 0:
        raise ValueError(f"price: temperature must be 0 or positive seconds, got {temperature}")
    check_sizes(program, sizes)
    values = {name: jnp.asarray(value, float) for name, value in sizes.items()}
    _warn_where_choices_differ(program, sizes)
    streams = program.streams
    zero = jnp.zeros((1,))
    start = Ready(jnp.zeros((0, 1)), jnp.zeros((len(streams), 1)), zero)

    def run(periods):
        parts, work = _price_levels(program, machine, values, temperature, periods, differences)
        durations = {level: Times(part.total, part.skew) for level, part in parts.items()}
        after, spans = finish(program, durations, streams, start, zero, temperature)
        return (parts, work), after, spans

    priced, after, spans = run({})
    if len(streams) > 1:
        # How much streams disturb one another depends on how far they overlap, which the
        # undisturbed schedule tells; one correction is enough.
        runs = dict(program.levels)  # how often each level is run
        periods = {body: span / runs[body] for body, span in spans.items()}
        priced, after, spans = run(periods | {program: after.end[0]})
    parts, work = priced
    levels = [level for level, _ in program.levels]
    spans |= {program: after.end[0]}
    return Timeline(
        total_s=after.end[0],
        parts=tuple(parts[level] for level in levels),
        spans=tuple(spans[level] for level in levels),
        work=tuple(work[level] for level in levels),
        program=program,
    )


def _iterations(program: Program) -> dict[Program, int]:
    """Length of every loop, by its body."""
    levels = [level for level, _ in program.levels]
    return {op.loop.body: op.loop.length for level in levels for op in level.operations if op.loop}


def _price_levels(
    program, machine, values, temperature, periods, differences
) -> tuple[dict[Program, Seconds], dict[Program, Array]]:
    """Seconds and work of every operation, for the program and the loops in it."""

    def visit(level: Program, values) -> list[tuple[Seconds, Array]]:
        means = {name: jnp.mean(value) for name, value in values.items()}
        work = _work(level, means)
        period = periods.get(level)
        rows = [jnp.broadcast_to(work[field], len(level.operations)) for field in FIELDS]
        taken = seconds(level, work, machine, temperature, period, differences)
        found = [(taken, jnp.stack(rows))]
        for op in level.operations:
            if op.loop is not None:
                found += inside(op.loop, values)
        return found

    def inside(loop: Loop, values) -> list[tuple[Seconds, Array]]:
        # A size with one value per iteration of this loop is one number in each of them.
        varying = {k: v for k, v in values.items() if v.ndim == 1 and v.shape[0] == loop.length}
        if not varying:
            return visit(loop.body, values)
        return jax.vmap(lambda each: visit(loop.body, values | each))(varying)

    levels = [level for level, _ in program.levels]
    parts, work = zip(*visit(program, values), strict=True)
    return dict(zip(levels, parts, strict=True)), dict(zip(levels, work, strict=True))


def _work(program: Program, values) -> Work:
    """Coefficients times monomials. Most levels use few of the fields."""
    used = program.coefficients.any((0, 2))
    work: dict[str, Array] = dict.fromkeys(FIELDS, jnp.zeros(()))
    if program.monomials:
        powers = [jnp.asarray(evaluate_monomial(m, values), float) for m in program.monomials]
        coefficients = jnp.asarray(program.coefficients[:, used], float)
        rows = jnp.tensordot(jnp.stack(powers), coefficients, axes=1)
        work |= zip(np.array(FIELDS)[used].tolist(), rows, strict=True)
    return work


def check_sizes(program: Program, sizes: Mapping[str, ArrayLike]) -> None:
    """Refuse sizes that `price` cannot take, as it says."""
    needed = program.symbols
    known = needed | program.inputs
    if missing := sorted(needed - set(sizes)):
        raise ValueError(f"price: no value for size {missing[0]!r}; needed: {sorted(needed)}")
    if unknown := sorted(set(sizes) - known):
        close = difflib.get_close_matches(unknown[0], known, n=1) or sorted(known)
        raise ValueError(f"price: the program has no size {unknown[0]!r}; it has {close}")
    lengths = set(_iterations(program).values())
    for name, value in sizes.items():
        shape = jnp.shape(value)
        if len(shape) > 1 or (len(shape) == 1 and shape[0] not in lengths):
            raise ValueError(
                f"price: size {name!r} must be a number, or one per iteration of a loop (the "
                f"program's loops have {sorted(lengths)}); got shape {shape}"
            )


def _warn_where_choices_differ(program: Program, sizes) -> None:
    if any(isinstance(value, Tracer) for value in sizes.values()):
        return
    means = {name: float(np.mean(np.asarray(value))) for name, value in sizes.items()}
    if broken := program.broken_assumptions(means):
        warnings.warn(
            f"price: the program was traced for {broken[0]}, which does not hold here; price "
            "program.decided_at(sizes) to have its kernels and branches chosen at these sizes",
            SizesApart,
            stacklevel=3,
        )
