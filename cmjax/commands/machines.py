"""`cmjax machines`: the catalog, and the source of every number in it."""

import dataclasses

import tyro
from rich.console import Console

from cmjax import report
from cmjax.console import check_target, emit
from cmjax.hardware import catalog, load_machine, sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """List the machines of the catalog, or every number of one with its source."""

    name: tyro.conf.Positional[str | None] = None
    """A name of the catalog, or a .toml file."""
    json: str | None = None
    """Write the result as JSON to this file; `-` is standard output."""

    def run(self, console: Console) -> None:
        check_target(self.json)
        if self.name is None:
            rows = {n: f"{load_machine(n).ranks} ranks" for n in catalog()}
        else:
            load_machine(self.name)
            rows = sources(self.name)
        emit(console, self.json, rows, report.key_value_table(self.name or "machines", rows))
