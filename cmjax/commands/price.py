"""`cmjax price`: any JAX function on a machine."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from cmjax import report
from cmjax.console import check_target, emit
from cmjax.cost import Timeline, prepare, price
from cmjax.cost.host import on_host
from cmjax.hardware import load_machine
from cmjax.program.users_code import users_code

_MOST_SIZE = 1e15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """Price any JAX function: `cmjax price module:function --size tokens=4096`."""

    program: tyro.conf.Positional[str]
    """module:function; its arguments carry jaxtyping shapes, or it returns a Step."""
    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    size: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """name=value, once per size of the program."""
    static: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """name=value, once per argument that is no array: a Python literal, else text."""
    tier: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """axis=tier, once per mesh axis: its links are die, node or supernode, or several of them,
    such as die:2,node:8. An axis not named is laid on the machine as JAX numbers devices."""
    json: str | None = None
    """Write the result as JSON to this file; `-` is standard output."""
    trace: Path | None = None
    """Write a Perfetto (Chrome) trace to this file."""

    def run(self, console: Console) -> None:
        check_target(self.json, self.trace)
        machine = load_machine(self.on)
        given = parse_sizes(self.size)
        static, tiers = parse_static(self.static), parse_tiers(self.tier)
        with users_code(self.program):
            found = prepare(self.program, machine, given, static=static, tiers=tiers)
        program = found.program
        timeline = on_host(lambda sizes: price(program, machine, sizes))(found.symbols)
        work = program.totals({k: float(np.mean(v)) for k, v in found.symbols.items()})
        if not float(timeline.total_s) > 0:
            raise ValueError(f"program {self.program!r}: it computes nothing that has a price")
        result = priced(timeline, work) | {"machine": machine.name, "sizes": given}
        if self.trace:
            timeline.to_perfetto(self.trace)
        emit(console, self.json, result, report.price_table(self.program, result))


def priced(timeline: Timeline, work: dict[str, float]) -> dict[str, Any]:
    """What the command reports: what the program does first, then how long that takes."""
    flops, nbytes = timeline.scope_flops, timeline.scope_hbm_bytes
    return {
        "flops": work["flops"],
        "hbm_bytes": work["read_bytes"] + work["write_bytes"],
        "total_ms": float(timeline.total_s) * 1e3,
        "breakdown": {k or "other": float(v) * 1e3 for k, v in timeline.scopes.items()},
        "breakdown_flops": {k or "other": float(v) for k, v in flops.items()},
        "breakdown_hbm_bytes": {k or "other": float(v) for k, v in nbytes.items()},
        "engines_busy_ms": {k: float(v) * 1e3 for k, v in timeline.engines.items()},
        "work": work,
    }


def parse_sizes(given: tuple[str, ...]) -> dict[str, float]:
    """`("batch=96", "context=4096")` as numbers.

    Raises: ValueError: not name=number, not positive, or a name given twice.
    """
    sizes: dict[str, float] = {}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not equals or not name or not 0 < number <= _MOST_SIZE:
            raise ValueError(
                f"size {text!r}: expected name=number with a positive number of at most "
                f"{_MOST_SIZE:g}"
            )
        if name in sizes:
            raise ValueError(f"size {name!r} is given twice")
        sizes[name] = number
    return sizes


def parse_static(given: tuple[str, ...]) -> dict[str, Any]:
    """`("layers=3", "causal=True", "kind=relu")` as values: Python literals, else text.

    Raises: ValueError: not name=value, or a name given twice.
    """
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"static {text!r}: expected name=value")
        if name in values:
            raise ValueError(f"static {name!r} is given twice")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            values[name] = value
    return values


def parse_tiers(given: tuple[str, ...]) -> dict[str, str | dict[str, int]]:
    """`("model=node", "data=node:4,supernode:8")` as where mesh axes lie.

    Raises: ValueError: not axis=tier, a count that is no whole number, or an axis given twice.
    """
    tiers: dict[str, str | dict[str, int]] = {}
    for text in given:
        axis, equals, said = text.partition("=")
        if not equals or not axis or not said:
            raise ValueError(f"tier {text!r}: expected axis=tier, or axis=tier:ranks,tier:ranks")
        if axis in tiers:
            raise ValueError(f"tier: axis {axis!r} is given twice")
        if ":" not in said:
            tiers[axis] = said
            continue
        pairs = [part.partition(":") for part in said.split(",")]
        if not all(count.isdecimal() and len(count) < 10 for _, _, count in pairs):
            raise ValueError(f"tier {text!r}: expected whole numbers of ranks after each ':'")
        tiers[axis] = {tier: int(count) for tier, _, count in pairs}
    return tiers
