"""Published measurements, as rows of a command to repeat and the value it should give."""

import csv
import dataclasses
import math
import shlex
from importlib import resources
from pathlib import Path

COLUMNS = ("row", "role", "command", "key", "value", "source")
ROLES = ("calibrate", "predict")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One published number.

    Fields:
      row: what was measured; role: `calibrate` or `predict`; command: arguments of `cmjax`;
      key: which key of the command's result; value: the number; source: where it is from.
    """

    row: str
    role: str
    command: tuple[str, ...]
    key: str
    value: float
    source: str


def measured_machines() -> list[str]:
    """Machines for which measurements are built in."""
    folder = resources.files("cmjax.cost") / "measurements"
    return sorted(f.name.removesuffix(".csv") for f in folder.iterdir() if f.name.endswith(".csv"))


def read_measurements(machine_or_path: str) -> list[Measurement]:
    """Rows of a built-in machine's measurements, or of a CSV file (its name ends in `.csv`).

    Raises: ValueError: no such file, wrong columns, or a bad row, named by file and line.
    """
    if machine_or_path.endswith(".csv"):
        origin = machine_or_path
        try:
            text = Path(machine_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"measurements {origin}: cannot be read: {error}") from None
    else:
        if machine_or_path not in measured_machines():
            known = ", ".join(measured_machines())
            raise ValueError(f"no measurements of {machine_or_path!r}; built in: {known}")
        origin = f"{machine_or_path}.csv"
        text = (resources.files("cmjax.cost") / "measurements" / origin).read_text("utf-8")
    reader = csv.DictReader(text.splitlines())
    if tuple(reader.fieldnames or ()) != COLUMNS:
        found = ", ".join(reader.fieldnames or ()) or "nothing"
        raise ValueError(f"{origin}: expected the columns {', '.join(COLUMNS)}; found {found}")
    rows = [_row(row, f"{origin} line {reader.line_num}") for row in reader]
    if not rows:
        raise ValueError(f"{origin}: no rows")
    return rows


def _row(row: dict, place: str) -> Measurement:
    if None in row or None in row.values():
        raise ValueError(f"{place}: expected {len(COLUMNS)} columns")
    if row["role"] not in ROLES:
        raise ValueError(f"{place}: role must be {' or '.join(ROLES)}, got {row['role']!r}")
    try:
        value = float(row["value"])
    except ValueError:
        raise ValueError(f"{place}: value must be a number, got {row['value']!r}") from None
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{place}: value must be positive, got {row['value']!r}")
    command = tuple(shlex.split(row["command"]))
    if len(command) < 2 or command[0] not in ("micro", "predict"):
        raise ValueError(
            f"{place}: command must start with 'micro OPERATOR' or 'predict decode|prefill', "
            f"got {row['command']!r}"
        )
    return Measurement(row["row"], row["role"], command, row["key"], value, row["source"])
