"""Calibration: least squares on micro-measurements, with gradients through the cost model.

    minimise over theta   sum over rows rho( log predicted(theta) - log measured )

with rho(r) = 2 (sqrt(1 + (r/c)^2) - 1) c^2, c = ROBUST: squares near zero, linear for outliers, as
rows come from different kernels and versions that no one machine description can all meet.
theta are the few constants whose source in the machine's catalog file reads `fitted by cmjax fit`.
End-to-end rows never enter; they stay predictions.
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # its parts are imported with their first use

from cmjax.cost.measured import Measurement
from cmjax.cost.micro import micro
from cmjax.files import replace_text
from cmjax.hardware import Supernode, replace_leaf, sources
from cmjax.hardware.units import UNITS
from cmjax.inputs import read_text

ROBUST = 0.05
"""Relative error beyond which a row pulls linearly instead of quadratically."""
FITTED = "fitted by cmjax fit"


@dataclasses.dataclass(frozen=True)
class Residual:
    """One calibrated row after the fit: predicted against measured, relative error."""

    measurement: Measurement
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measurement.value - 1


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A calibrated machine: the values found (dotted key -> SI value) and what is left."""

    machine: Supernode
    values: dict[str, float]
    residuals: tuple[Residual, ...]


def fitted_keys(name_or_path: str) -> list[str]:
    """Constants of a machine that calibration may change, by dotted key."""
    return [key for key, source in sources(name_or_path).items() if source.startswith(FITTED)]


def fit(machine: Supernode, keys: Sequence[str], rows: Sequence[Measurement]) -> Calibration:
    """Calibrate `keys` of `machine` on the `micro` rows whose role is `calibrate`.

    Raises: ValueError: nothing to fit, or more constants than rows.
    """
    used = [row for row in rows if row.role == "calibrate"]
    for row in used:
        if row.command[0] != "micro":
            raise ValueError(f"fit: row {row.row!r} is end-to-end; only micro rows may calibrate")
    if not keys or len(used) < len(keys):
        raise ValueError(f"fit: {len(used)} rows for {len(keys)} constants")
    measured = np.log([row.value for row in used])

    with jax.enable_x64(True):
        benchmarks = [_benchmark(row, machine) for row in used]

        def machine_at(theta) -> Supernode:
            changed = machine
            for key, value in zip(keys, jnp.exp(theta), strict=True):
                changed = replace_leaf(changed, key, value)
            return changed

        @jax.jit
        def predicted(theta):
            at = machine_at(theta)
            pairs = zip(benchmarks, used, strict=True)
            return jnp.log(jnp.stack([b.measure(at)[r.key] for b, r in pairs]))

        jacobian = jax.jit(jax.jacfwd(predicted))
        start = np.log([float(operator.attrgetter(key)(machine)) for key in keys])
        found = scipy.optimize.least_squares(
            lambda theta: np.asarray(predicted(theta)) - measured,
            start,
            jac=lambda theta: np.asarray(jacobian(theta)),  # pyright: ignore[reportArgumentType]
            loss="soft_l1",
            f_scale=ROBUST,
            bounds=([np.log(1e-9)] * len(keys), [0.0] * len(keys)),  # fractions and seconds below 1
        )
        final = np.exp(np.asarray(predicted(found.x)))
    values = dict(zip(keys, np.exp(found.x).tolist(), strict=True))
    calibrated = functools.reduce(lambda m, kv: replace_leaf(m, *kv), values.items(), machine)
    residuals = tuple(Residual(r, float(p)) for r, p in zip(used, final, strict=True))
    return Calibration(calibrated, values, residuals)


def parse_options(arguments: Sequence[str]) -> dict[str, int | str]:
    """`--ep 8 --quant int8` as keyword arguments of a micro-benchmark."""
    if len(arguments) % 2 or any(not flag.startswith("--") for flag in arguments[::2]):
        raise ValueError(f"options must be pairs '--name value', got {' '.join(arguments)!r}")
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return {
        flag[2:].replace("-", "_"): int(value) if value.isdecimal() else value
        for flag, value in pairs
    }


def write_back(path: Path, values: dict[str, float]) -> None:
    """Put fitted values into a machine's TOML file, leaving everything else as it is."""
    text = read_text(path)
    for dotted, value in values.items():
        table, _, key = dotted.rpartition(".")
        shown = f"{value / UNITS['s']['us']:.4g} us" if key.endswith("_s") else f"{value:.2%}"
        section = re.compile(rf"(?ms)(^\[{re.escape(table)}\].*?^{key} = {{ value = )\"[^\"]*\"")
        text, count = section.subn(rf'\g<1>"{shown}"', text, count=1)
        if count != 1:
            raise ValueError(f"{path}: cannot find {dotted} to write it back")
    replace_text(path, text)


def _benchmark(row: Measurement, machine: Supernode):
    return micro(row.command[1], machine, **parse_options(row.command[2:]))
