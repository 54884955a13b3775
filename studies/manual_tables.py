"""The tables of the manual that are computed: one Markdown file each, which its pages include.

    python -m studies.manual_tables [--out docs/tables]

`end_to_end` and `kernels` are what `cmjax validate` prints, `machines` what the catalog holds,
`counted` what XLA, `jax.experimental.roofline` and cmjax count in the same programs, `mindstudio`
the steps of another simulator beside its own errors, `microbatches` what one and two microbatches
take if something were otherwise. A test holds the files against a fresh run.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import roofline
from rich.console import Console

from cmjax.console import terminal
from cmjax.cost.measured import Measurement, measured_machines, read_measurements
from cmjax.deploy.validation import ValidationRow, validate
from cmjax.files import replace_text
from cmjax.hardware import catalog, load_machine
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.program import trace, trip_count
from studies import microbatches, mindstudio

Rows = Iterable[Sequence[str]]
_UNITS = {
    "us": "µs",
    "tpot_ms": "TPOT, ms",
    "tokens_per_s_per_npu": "tokens/s per NPU",
    "attention_stream_us": "µs",
    "moe_stream_us": "µs",
    "utilization": "share of peak",
    "gb_per_s": "GB/s",
    "tflops": "TFLOPS",
}
"""Keys of the measurements -> what their numbers are."""
_SIDE = 256
"""Rows and columns of the matrices in `counted`."""
_TIMES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """Options of this program."""

    out: Path = Path("docs/tables")
    """Folder of the tables."""


def end_to_end() -> str:
    """Whole steps: published and predicted."""
    return markdown(
        ("machine", "what", "unit", "published", "predicted", "error, %"),
        (validation_cells(machine, row) for machine, row in _validated("predict")),
    )


def kernels() -> str:
    """Kernels and exchanges: measured and modelled, and whether constants were fitted to them."""
    return markdown(
        ("machine", "what", "unit", "measured", "modelled", "error, %", "fitted"),
        (
            (*validation_cells(machine, row), "yes" if row.role == "calibrate" else "no")
            for machine, row in _validated("micro")
        ),
    )


def machines() -> str:
    """The catalog, per die."""
    rows = []
    for name in catalog():
        machine = load_machine(name)
        chip = machine.chip
        npus = machine.nodes * machine.npus_per_node
        rows.append(
            (
                f"`{name}`",
                f"{npus:,}",
                f"{machine.dies_per_npu}",
                f"{chip.cube_flops_16bit / 1e12:,.0f}",
                f"{chip.cube_flops_8bit / 1e12:,.0f}",
                f"{chip.hbm_bytes / 1e9:,.0f}",
                f"{chip.hbm_bytes_per_s / 1e12:.2f}",
                f"{machine.fabric.supernode.bandwidth_bytes_per_s / 1e9:,.0f}",
            )
        )
    heads = ("machine", "NPUs", "dies per NPU", "16-bit, TFLOPS", "8-bit, TFLOPS", "HBM, GB",
             "HBM, TB/s", "between nodes, GB/s")  # fmt: skip
    return markdown(heads, rows)


def counted() -> str:
    """How many matrix products each counts in programs that make a known number of them."""
    x = jax.ShapeDtypeStruct((_SIDE, _SIDE), jnp.float32)
    product = 2 * _SIDE**3

    def cells(name: str, fn: Callable, made: int):
        found = (by_xla(fn, x), by_roofline(fn, x), by_cmjax(fn, x))
        return (name, f"{made}", *(f"{round(flops / product)}" for flops in found))

    return markdown(
        ("program", "products", "XLA", "roofline", "cmjax"),
        (cells(name, fn, made) for name, (fn, made) in PROGRAMS.items()),
    )


def by_xla(fn: Callable, *args) -> float:
    """FLOP by XLA's `cost_analysis` of the compiled program."""
    return (jax.jit(fn).lower(*args).compile().cost_analysis() or {}).get("flops", 0.0)


def by_roofline(fn: Callable, *args) -> float:
    """FLOP by `jax.experimental.roofline`."""
    return float(roofline.roofline(fn)(*args)[1].unfused_flops)


def by_cmjax(fn: Callable, *args) -> float:
    """FLOP by cmjax."""
    return trace(fn, *args).totals({})["flops"]


def _scan(x):
    return lax.scan(lambda c, _: (c @ c, None), x, None, length=_TIMES)[0]


def _fori(x):
    return lax.fori_loop(0, _TIMES, lambda _, c: c @ c, x)


def _while(x):
    with trip_count(_TIMES):
        return lax.while_loop(lambda s: s[0] < _TIMES, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))[1]


def _cond(x):
    return lax.cond(x[0, 0] > 0, lambda a: a @ a, lambda a: a + 1, x)


def _cond_in_scan(x):
    return lax.scan(lambda c, _: (_cond(c), None), x, None, length=_TIMES)[0]


PROGRAMS: dict[str, tuple[Callable, int]] = {
    "one product": (lambda x: x @ x, 1),
    f"`lax.scan` of {_TIMES}": (_scan, _TIMES),
    f"`lax.fori_loop` of {_TIMES}": (_fori, _TIMES),
    f"`lax.while_loop`, {_TIMES} declared": (_while, _TIMES),
    "`lax.cond`, the longer branch": (_cond, 1),
    f"`lax.cond` in a `lax.scan` of {_TIMES}": (_cond_in_scan, _TIMES),
}
"""Programs, and the matrix products that they make."""

TABLES: dict[str, Callable[[], str]] = {
    "end_to_end": end_to_end,
    "kernels": kernels,
    "machines": machines,
    "counted": counted,
    "mindstudio": lambda: markdown(mindstudio.HEADS, mindstudio.cells()),
    "microbatches": lambda: markdown(microbatches.HEADS, microbatches.cells()),
}


def validation_cells(machine: str, row: ValidationRow) -> tuple[str, ...]:
    """A row of a table of predictions: one number a cell."""
    return (
        machine,
        row.row,
        _UNITS[row.key],
        short(row.measured),
        short(row.predicted),
        f"{100 * row.error:+.1f}",
    )


def short(value: float) -> str:
    """Four significant digits at most, and no decimals in thousands."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def markdown(heads: Sequence[str], rows: Rows) -> str:
    """A Markdown table; columns of numbers are set to the right."""
    rows = [list(row) for row in rows]
    right = [all(_numeric(row[column]) for row in rows) for column in range(len(heads))]
    rule = ("---:" if number else "---" for number in right)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *rows))


def _numeric(cell: str) -> bool:
    return cell.replace(",", "").lstrip("+-").replace(".", "", 1).isdecimal()


def _validated(kind: str) -> Iterable[tuple[str, ValidationRow]]:
    for machine in measured_machines():
        rows: list[Measurement] = [
            row for row in read_measurements(machine) if row.command[0] == kind
        ]
        yield from ((machine, row) for row in validate(rows, machine))


def main(options: Tables, console: Console) -> None:
    """Write every table."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name, table in TABLES.items():
        replace_text(options.out / f"{name}.md", table())
        console.print(f"written: {options.out}/{name}.md")


if __name__ == "__main__":
    leave(run_program(lambda asked: main(asked, terminal()), Tables, __doc__))
