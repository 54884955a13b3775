"""Predictions beside published measurements.   error = predicted / measured - 1."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
