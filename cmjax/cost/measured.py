"""Published measurements, as rows of a command to repeat and the value it should give."""

import dataclasses
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

from cmjax.inputs import in_one_line, parse_csv, read_text, records_of, shown

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

    @contextmanager
    def named(self) -> Iterator[None]:
        """What is wrong with this row says which it is.

        Raises: ValueError: of what runs inside, with the row's name before it.
        """
        try:
            yield
        except ValueError as error:
            raise ValueError(f"row {self.row!r}: {error}") from None


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
        text = read_text(origin, source=f"measurements {origin}")
    else:
        if machine_or_path not in measured_machines():
            known = ", ".join(measured_machines())
            raise ValueError(f"no measurements of {machine_or_path!r}; built in: {known}")
        origin = f"{machine_or_path}.csv"
        text = (resources.files("cmjax.cost") / "measurements" / origin).read_text("utf-8")
    rows = parse_csv(text, origin)
    if (names := tuple(rows[0][1]) if rows else ()) != COLUMNS:
        found = " ".join(", ".join(names).split()) or "nothing"
        raise ValueError(f"{origin}: expected the columns {', '.join(COLUMNS)}; found {found}")
    return [_row(row, f"{origin} line {line}") for line, row in records_of(rows, COLUMNS, origin)]


def _row(row: dict, place: str) -> Measurement:
    if row["role"] not in ROLES:
        raise ValueError(f"{place}: role must be {' or '.join(ROLES)}, got {row['role']!r}")
    try:
        value = float(row["value"])
    except ValueError:
        raise ValueError(f"{place}: value must be a number, got {row['value']!r}") from None
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{place}: value must be positive, got {row['value']!r}")
    try:
        command = tuple(shlex.split(row["command"]))
    except ValueError as error:  # a quotation that does not end
        raise ValueError(
            f"{place}: command {shown(row['command'])}: {in_one_line(error)}"
        ) from None
    if len(command) < 2 or command[0] not in ("micro", "predict"):
        raise ValueError(
            f"{place}: command must start with 'micro OPERATOR' or 'predict decode|prefill', "
            f"got {row['command']!r}"
        )
    return Measurement(row["row"], row["role"], command, row["key"], value, row["source"])
