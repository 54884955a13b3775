"""`cmjax price`: any JAX function on a machine."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console

from cmjax import report
from cmjax.console import check_target, emit
from cmjax.cost import price
from cmjax.hardware import load_machine
from cmjax.program.step import load_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """Price any JAX function: `cmjax price module:function --size tokens=4096`."""

    program: tyro.conf.Positional[str]
    """module:function; its arguments carry jaxtyping shapes, or it returns a Step."""
    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    size: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """name=value, once per size of the program."""
    json: str | None = None
    """Write the result as JSON to this file; `-` is standard output."""
    trace: Path | None = None
    """Write a Perfetto (Chrome) trace to this file."""

    def run(self, console: Console) -> None:
        check_target(self.json, self.trace)
        machine = load_machine(self.on)
        given = parse_sizes(self.size)
        step = load_step(self.program, machine)
        symbols = step.symbols(given)
        program = step.trace()
        timeline = jax.jit(lambda sizes: price(program, machine, sizes))(dict(symbols))
        scopes = {k or "other": float(v) * 1e3 for k, v in timeline.scopes.items()}
        result = {
            "total_ms": float(timeline.total_s) * 1e3,
            "breakdown": scopes,
            "engines_busy_ms": {k: float(v) * 1e3 for k, v in timeline.engines.items()},
            "work": program.totals({k: float(np.mean(v)) for k, v in symbols.items()}),
            "machine": machine.name,
            "sizes": given,
        }
        if self.trace:
            timeline.to_perfetto(self.trace)
        emit(console, self.json, result, report.price_table(self.program, result))


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
        if not equals or not name or not 0 < number < float("inf"):
            raise ValueError(f"size {text!r}: expected name=number with a positive number")
        if name in sizes:
            raise ValueError(f"size {name!r} is given twice")
        sizes[name] = number
    return sizes
