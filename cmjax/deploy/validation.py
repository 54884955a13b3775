"""Predictions held against published measurements, row by row.   error = predicted / measured - 1.

A row says which prediction to make as a command line would. It is data, from a file that may be
anyone's: its options are looked up in a table of allowed ones, and nothing of it is executed.
"""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.cost.fit import Measure, check_same_machine, micro_measure, parse_options
from cmjax.cost.host import on_host
from cmjax.cost.interval import interval
from cmjax.cost.measured import Measurement, read_measurements
from cmjax.cost.micro import MicroBenchmark, micro
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.predict import predict
from cmjax.deploy.predictor import known_uncertainty
from cmjax.deploy.requests import Requests, parse_acceptance, parse_load
from cmjax.hardware import Supernode, leaf_names, load_machine

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
      interval: 90 % of what it may be by the model, low and high.
    Raises: ValueError if the measured number is not positive.
    """

    row: str
    role: str
    predicted: float
    measured: float
    source: str
    key: str
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        if not self.measured > 0:
            raise ValueError(
                f"ValidationRow {self.row!r}: measured must be positive, got {self.measured:g}"
            )

    @property
    def error(self) -> float:
        """Relative error of the prediction, signed."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool:
        """Whether the measured number lies in the interval."""
        return self.interval is not None and self.interval[0] <= self.measured <= self.interval[1]


@dataclasses.dataclass(frozen=True)
class RoleSummary:
    """How far off the rows of one role are.

    Attributes:
      rows: how many there are.
      mean_error, worst_error: absolute relative errors.
      worst_row: name of the row that is furthest off.
      coverage: share of the rows that lie in their 90 % interval; half_width: the median of the
        intervals', relative. None where no row has one.
    """

    rows: int
    mean_error: float
    worst_error: float
    worst_row: str
    coverage: float | None = None
    half_width: float | None = None


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
    with measurement.named():
        result, intervals = _result(measurement.command, machine)
        value = result.get(measurement.key)
        if not isinstance(value, int | float):
            known = ", ".join(k for k, v in result.items() if isinstance(v, int | float))
            raise ValueError(f"no key {measurement.key!r} in the result; it has {known}")
    return ValidationRow(
        row=measurement.row,
        role=measurement.role,
        predicted=float(value),
        measured=measurement.value,
        source=measurement.source,
        key=measurement.key,
        interval=intervals.get(measurement.key),
    )


def measure_of(row: Measurement, machine: Supernode) -> Measure:
    """What a row measures, as a function of the machine: for `cmjax.cost.fit.update`.

    Raises: ValueError: a command that cannot be read, a key without a gradient, or a row of another
      machine.
    """
    if row.command[0] == "micro":
        return micro_measure(row, machine)
    with row.named():
        options = _predict_options(row.command)
        check_same_machine(options.pop("on", None), machine)
        model = options.pop("model", "deepseek-r1")
        known = predict(model, machine, **options).headlines()
        if row.key not in known:
            raise ValueError(f"no key {row.key!r} to fit to; there are {', '.join(known)}")
    return lambda at: predict(model, at, **options).headlines()[row.key]


def summary(rows: Sequence[ValidationRow]) -> dict[str, RoleSummary]:
    """Mean and worst absolute relative error per role, in the order the roles appear."""
    by_role: dict[str, list[ValidationRow]] = {}
    for row in rows:
        by_role.setdefault(row.role, []).append(row)
    return {role: _summarise(group) for role, group in by_role.items()}


def _summarise(group: list[ValidationRow]) -> RoleSummary:
    errors = np.abs([row.error for row in group])
    worst = int(errors.argmax())
    coverage = half_width = None
    if sure := [row for row in group if row.interval is not None]:
        coverage = float(np.mean([row.inside for row in sure]))
        half_width = float(np.median([_half_width(row) for row in sure]))
    return RoleSummary(
        len(group), float(errors.mean()), float(errors[worst]), group[worst].row,
        coverage, half_width,
    )  # fmt: skip


def _half_width(row: ValidationRow) -> float:
    assert row.interval is not None
    return (row.interval[1] - row.interval[0]) / 2 / row.predicted


def _result(
    command: Sequence[str], machine: str
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    kind, what, *arguments = command
    if kind == "micro":
        options = parse_options(arguments)
        on = load_machine(str(options.pop("on", machine)))
        return _micro(micro(what, on, **options), on)
    options = _predict_options(command)
    on = options.pop("on", machine)
    found = predict(options.pop("model", "deepseek-r1"), on, **options)
    ends = {key: (float(e[0]), float(e[1])) for key, e in found.interval.items()}
    return found.to_dict(), ends


def _micro(benchmark: MicroBenchmark, on: Supernode):
    """Results of a micro-benchmark, and the intervals of its time and of what follows from it."""
    leaves, tree = jax.tree.flatten(on)

    def log_time(logs):
        scaled = [leaf * jnp.exp(log) for leaf, log in zip(leaves, logs, strict=True)]
        return jnp.log(benchmark.measure(jax.tree.unflatten(tree, scaled))["us"])

    values = {key: float(value) for key, value in on_host(benchmark.measure)(on).items()}
    known = known_uncertainty(on)
    if known is None:
        return values, {}
    names = leaf_names(on)
    slopes = np.stack(on_host(jax.grad(log_time))([np.zeros(()) for _ in leaves]))
    of_time = interval(1.0, slopes[[names.index(key) for key in known.keys]], known)
    return values, {key: (v * of_time.low, v * of_time.high) for key, v in values.items()}


class _Unreadable(ValueError):
    """A word of a command that is none of ours."""


def _predict_options(command: Sequence[str]) -> dict[str, Any]:
    """The words of `predict PHASE --option VALUE ...` as keyword arguments of `predict`."""
    _, phase, *arguments = command
    try:
        return _options_of(phase, arguments)
    except _Unreadable as error:
        raise ValueError(f"cannot read the command {' '.join(command)!r}: {error}") from None


def _options_of(phase: str, arguments: Sequence[str]) -> dict[str, Any]:
    types = {**_BESIDE, **_types(Deployment), **_types(Requests)}
    words = iter(_joined(arguments))
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
        if name == "acceptance":
            try:
                found[name] = parse_acceptance([next(words, "")])
            except ValueError as error:
                raise _Unreadable(str(error)) from None
            continue
        found[name] = _value(word, words, types[name])
    if "loads" in found:
        found |= parse_load(found.pop("loads"))
    return found


def _joined(words: Sequence[str]) -> list[str]:
    """Words of which several numbers in a row are one, `0.9 0.7` as `0.9,0.7`."""
    found: list[str] = []
    for word in words:
        both = found and not word.startswith("--") and not found[-1].startswith("--")
        if both and _numeric(word) and _numeric(found[-1].rpartition(",")[2]):
            found[-1] += f",{word}"
        else:
            found.append(word)
    return found


def _numeric(word: str) -> bool:
    return word.replace(".", "", 1).isdecimal()


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
