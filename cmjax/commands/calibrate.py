"""`cmjax fit` and `cmjax validate`: constants from measurements, predictions against them."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from cmjax import report
from cmjax.console import check_target, emit, track
from cmjax.cost.fit import fit, fitted_prior, update, write_back
from cmjax.cost.measured import measured_machines, read_measurements
from cmjax.deploy.validation import measure_of, summary, validate
from cmjax.hardware import load_machine, uncertainty


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Calibrate a machine on published kernel times, or update it by your own rows."""

    machine: tyro.conf.Positional[str] = "cloudmatrix384"
    """A name of the catalog, or a .toml file (then give the rows too)."""
    rows: str | None = None
    """CSV of your own measurements, of any kind: what the machine's constants and their spreads say
    is updated by them (default: its fitted constants alone, by the built-in rows)."""
    write: Path | None = None
    """A machine .toml to write the values into; without it nothing is changed."""
    json: str | None = None
    """Write the result as JSON to this file; `-` is standard output."""

    def run(self, console: Console) -> None:
        check_target(self.json, self.write)
        machine = load_machine(self.machine)
        rows = read_measurements(self.machine if self.rows is None else self.rows)
        if self.rows is None:
            found = fit(*fitted_prior(self.machine), rows)
        else:
            measures = [measure_of(row, machine) for row in track(rows, "rows")]
            found = update(machine, uncertainty(self.machine), rows, measures)
        if self.write is not None:
            write_back(self.write, found, model_error=self.rows is None)
        result = {
            "machine": machine.name,
            "values": found.values,
            "spread": dict(zip(found.values, found.uncertainty.spread.tolist(), strict=True)),
            "spread_before": dict(zip(found.values, found.before.tolist(), strict=True)),
            "residuals": [
                {
                    "row": r.measurement.row,
                    "measured": r.measurement.value,
                    "predicted": r.predicted,
                    "error": r.error,
                }
                for r in found.residuals
            ],
        }
        emit(console, self.json, result, report.residual_table(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validate:
    """Compare predictions with published measurements, or with a CSV of yours."""

    csv: tyro.conf.Positional[str | None] = None
    """Measurements in the format of cmjax/cost/measurements/README.md (default: all built-in)."""
    on: str | None = None
    """Only this machine; with a CSV, the machine of rows that name none (cloudmatrix384)."""
    json: str | None = None
    """Write the result as JSON to this file; `-` is standard output."""

    def run(self, console: Console) -> None:
        check_target(self.json)
        if self.csv is not None:
            on = "cloudmatrix384" if self.on is None else self.on
            todo = {on: read_measurements(self.csv)}
        else:
            names = measured_machines() if self.on is None else [self.on]
            todo = {name: read_measurements(name) for name in names}
        found = {name: validate(track(rows, name), name) for name, rows in todo.items()}
        result = {
            name: {
                "rows": [dataclasses.asdict(r) for r in rows],
                "summary": {k: dataclasses.asdict(s) for k, s in summary(rows).items()},
            }
            for name, rows in found.items()
        }
        tables = [(name, report.validation_table(rows)) for name, rows in found.items()]
        emit(console, self.json, result, *(part for table in tables for part in table))
