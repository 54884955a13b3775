"""Predictions held against published measurements, row by row.   error = predicted / measured - 1.

A row says which prediction to make as a command line would. It is data, from a file that may be
anyone's: its options are looked up in a table of allowed ones, and nothing of it is executed.
"""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from cmjax.cost.fit import parse_options
from cmjax.cost.measured import Measurement, read_measurements
from cmjax.cost.micro import micro
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.predict import predict
from cmjax.deploy.requests import Requests
from cmjax.hardware import load_machine

_FLAGS = {f"--{no}mtp": ("mtp", not no) for no in ("", "no-")}
_NAMES = {"mtp_acceptance": "acceptance", "load": "loads"}
_BESIDE = {"on": str, "loads": str, "plan": str, "slo_tpot_ms": float}


@dataclasses.dataclass(frozen=True)
class ValidationRow:
    """One published number and what the model says.

    Attributes:
      row: what was measured.
      role: `calibrate` (constants were fitted to it) or `predict` (nothing was).
      predicted, measured: in the unit that `key` names.
      source: where the measurement is from.
      key: key of the result, such as `tpot_ms`.
    Raises: ValueError if the measured number is not positive.
    """

    row: str
    role: str
    predicted: float
    measured: float
    source: str
    key: str

    def __post_init__(self):
        if not self.measured > 0:
            raise ValueError(
                f"ValidationRow {self.row!r}: measured must be positive, got {self.measured:g}"
            )

    @property
    def error(self) -> float:
        """Relative error of the prediction, signed."""
        return self.predicted / self.measured - 1


@dataclasses.dataclass(frozen=True)
class RoleSummary:
    """How far off the rows of one role are.

    Attributes:
      rows: how many there are.
      mean_error, worst_error: absolute relative errors.
      worst_row: name of the row that is furthest off.
    """

    rows: int
    mean_error: float
    worst_error: float
    worst_row: str


def validate(
    measurements: str | Iterable[Measurement], machine: str = "cloudmatrix384"
) -> list[ValidationRow]:
    """Predict every row of a file of measurements.

    Args:
      measurements: a machine whose rows are built in, a `.csv` file, or rows.
      machine: of rows that name none.
    Raises: ValueError: a file that cannot be read, a row that cannot be predicted, named.
    """
    rows = read_measurements(measurements) if isinstance(measurements, str) else measurements
    return [compare(row, machine) for row in rows]


def compare(measurement: Measurement, machine: str) -> ValidationRow:
    """The prediction that a row asks for, beside its measured value.

    Raises: ValueError: a command that cannot be read, or a key that its result does not have.
    """
    result = _result(measurement, machine)
    value = result.get(measurement.key)
    if not isinstance(value, int | float):
        known = ", ".join(k for k, v in result.items() if isinstance(v, int | float))
        raise ValueError(
            f"row {measurement.row!r}: no key {measurement.key!r} in the result; it has {known}"
        )
    return ValidationRow(
        row=measurement.row,
        role=measurement.role,
        predicted=float(value),
        measured=measurement.value,
        source=measurement.source,
        key=measurement.key,
    )


def summary(rows: Sequence[ValidationRow]) -> dict[str, RoleSummary]:
    """Mean and worst absolute relative error per role, in the order the roles appear."""
    by_role: dict[str, list[ValidationRow]] = {}
    for row in rows:
        by_role.setdefault(row.role, []).append(row)
    return {role: _summarise(group) for role, group in by_role.items()}


def _summarise(group: list[ValidationRow]) -> RoleSummary:
    errors = np.abs([row.error for row in group])
    worst = int(errors.argmax())
    return RoleSummary(len(group), float(errors.mean()), float(errors[worst]), group[worst].row)


def _result(measurement: Measurement, machine: str) -> dict[str, Any]:
    kind, what, *arguments = measurement.command
    try:
        if kind == "micro":
            options = parse_options(arguments)
            on = load_machine(str(options.pop("on", machine)))
            measured = jax.jit(micro(what, on, **options).measure)(on)
            return {key: float(value) for key, value in measured.items()}
        options = _predict_options(what, arguments)
        on = options.pop("on", machine)
        return predict(options.pop("model", "deepseek-r1"), on, **options).to_dict()
    except _Unreadable as error:
        command = " ".join(measurement.command)
        raise ValueError(
            f"row {measurement.row!r}: cannot read the command {command!r}: {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"row {measurement.row!r}: {error}") from None


class _Unreadable(ValueError):
    """A command that is none of ours."""


def _predict_options(phase: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of `cmjax predict` as keyword arguments of `predict`."""
    types = {**_BESIDE, **_types(Deployment), **_types(Requests)}
    words = iter(arguments)
    found: dict[str, Any] = {"phase": phase}
    for word in words:
        if word in _FLAGS:
            name, value = _FLAGS[word]
            found[name] = value
            continue
        name = word.removeprefix("--").replace("-", "_")
        name = _NAMES.get(name, name)
        if not word.startswith("--") or name not in types or name in ("phase", "mtp", "load"):
            raise _Unreadable(f"{word!r} is no option of predict")
        found[name] = _value(word, words, types[name])
    if found.get("loads") == "perfect":
        del found["loads"]
    return found


def _types(options: type) -> dict[str, Any]:
    return typing.get_type_hints(options)


def _value(option: str, words: Iterator[str], annotation: Any) -> Any:
    """The next word as a field's type has it."""
    text = next(words, None)
    if text is None:
        raise _Unreadable(f"{option} has no value")
    if typing.get_origin(annotation) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(annotation)}
        if text not in choices:
            raise _Unreadable(f"{option} must be {' or '.join(choices)}, got {text!r}")
        return choices[text]
    kinds = (annotation, *typing.get_args(annotation))
    kind = next((kind for kind in (int, float) if kind in kinds), str)
    try:
        return kind(text)
    except ValueError:
        raise _Unreadable(f"{option} takes a number, got {text!r}") from None
