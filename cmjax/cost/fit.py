"""Calibration: constants and how sure they are, from measurements, by gradients of the model.

    minimise over theta   sum over rows rho((log predicted(theta) - log measured) / noise)
                          + |(theta - mu) / spread|^2

theta are logarithms of constants, mu and spread what is believed before (their prior), and
rho(r) = 2 (sqrt(1 + r^2) - 1): squares near zero, linear for outliers, as rows come from different
kernels and versions that no one machine description can all meet. In coordinates z with
theta = mu + L z, where L L^T is the prior's covariance, the posterior's covariance is (Laplace)

    C = L (1 + J^T W J)^-1 L^T,      J = d(log predicted / noise) / dz,   W = 1 / sqrt(1 + r^2)

A row that was fitted lies nearer to the model than one that was not. Without it, it would be off by
r / (1 - h), h = W J (1 + J^T W J)^-1 J^T its leverage; the model's own error, by kind of operation,
is estimated from those errors.

`fit` calibrates the few constants of a catalog machine whose source reads `fitted by cmjax fit` on
micro-measurements; end-to-end rows never enter, they stay predictions. `update` takes a user's own
measurements, of any kind, and moves whatever they say something about.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # its parts are imported with their first use
from jaxtyping import ArrayLike, Float

from cmjax.cost.host import on_host
from cmjax.cost.measured import Measurement
from cmjax.cost.micro import micro
from cmjax.files import replace_text
from cmjax.hardware import (
    FITTED,
    Supernode,
    Uncertainty,
    describe_key,
    leaf_names,
    load_machine,
    prior,
    replace_leaf,
    sources,
)
from cmjax.hardware.units import UNITS
from cmjax.inputs import parse_toml, read_text

NOISE = 0.05
"""Relative error that published rows of a kernel have beside one another (versions, shapes)."""
OWN_NOISE = 0.03
"""Relative error of a user's own measurements."""
_ERROR, _ERROR_ROWS = 0.1, 4
"""What is believed of the model's own error of a kind of operation, and how many rows weigh as much
as that: simulators of kernels publish 11 to 12 % (LLMCompass, ISCA 2024; KernelSight-LM,
arXiv:2606.28565)."""
_AGREE = 0.2  # by how much two measurements of the same thing may differ
_LEARNT = 0.99  # of a spread that is left: more, and the rows say nothing of the constant
_KIND = {
    "dispatch": "exchange",
    "combine": "exchange",
    "gemm": "matrix",
    "latent-attention": "attention",
    "decode-attention": "attention",
    "attention": "attention",
}
Measure = Callable[[Supernode], Float[ArrayLike, ""]]


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
    """A calibrated machine.

    Fields:
      machine: with the values found. values: those of constants that moved or became surer, dotted
        key -> SI value.
      uncertainty: of the same constants, after the rows. before: their standard deviations before.
      residuals: what is left, row by row.
      model_error: by kind of operation, how far off rows are that the fit has not seen.
    """

    machine: Supernode
    values: dict[str, float]
    uncertainty: Uncertainty
    before: Float[np.ndarray, "keys"]
    residuals: tuple[Residual, ...]
    model_error: dict[str, float]


def fitted_keys(name_or_path: str) -> list[str]:
    """Constants of a machine that calibration may change, by dotted key."""
    return [key for key, source in sources(name_or_path).items() if source.startswith(FITTED)]


def fitted_prior(name_or_path: str) -> tuple[Supernode, Uncertainty]:
    """A machine before its fit, and what is believed of the constants that it may change."""
    machine, before = prior(name_or_path)
    keys = fitted_keys(name_or_path)
    at = [before.keys.index(key) for key in keys]
    return machine, Uncertainty(tuple(keys), before.covariance[np.ix_(at, at)])


def fit(machine: Supernode, before: Uncertainty, rows: Sequence[Measurement]) -> Calibration:
    """Calibrate constants of a machine on the `micro` rows whose role is `calibrate`.

    Args:
      machine: its constants before. before: those that may change, and how sure they are; for a
        machine of the catalog both are `fitted_prior`.
    Raises: ValueError: nothing to fit, or an end-to-end row.
    """
    used = [row for row in rows if row.role == "calibrate"]
    for row in used:
        if row.command[0] != "micro":
            raise ValueError(f"fit: row {row.row!r} is end-to-end; only micro rows may calibrate")
    if not before.keys or not used:
        raise ValueError(
            f"fit: {machine.name} has {len(used)} rows to calibrate {len(before.keys)} fitted "
            "constants; give --rows, by which all of its constants are updated"
        )
    measures = [micro_measure(row, machine) for row in used]
    return _posterior(machine, before, used, measures, NOISE, keep=before.keys)


def update(
    machine: Supernode,
    before: Uncertainty,
    rows: Sequence[Measurement],
    measures: Sequence[Measure],
    noise: float = OWN_NOISE,
) -> Calibration:
    """What measurements of a machine say about its constants, given what was believed of them.

    Args:
      machine: constants before. before: how sure they are (`cmjax.hardware.uncertainty`).
      rows: measured values. measures: the same as functions of the machine.
      noise: relative standard deviation of the measurements.
    Raises: ValueError: rows of one thing that contradict each other, or that say nothing of any
      constant.
    """
    if not rows:
        raise ValueError("fit: no rows")
    _check_agreement(rows)
    at = np.flatnonzero(before.spread > 0)
    known = Uncertainty(tuple(before.keys[i] for i in at), before.covariance[np.ix_(at, at)])
    found = _posterior(machine, known, rows, measures, noise, keep=before.joint)
    if (found.uncertainty.spread > _LEARNT * found.before).all():
        raise ValueError(
            f"fit: the {len(rows)} row(s) identify no constant of {machine.name}: none becomes "
            "surer by them"
        )
    return found


def micro_measure(row: Measurement, machine: Supernode) -> Measure:
    """A `micro` row as a function of the machine.

    Raises: ValueError: an unknown operator, option or key, or a row of another machine.
    """
    with row.named():
        options = parse_options(row.command[2:])
        check_same_machine(options.pop("on", None), machine)
        benchmark = micro(row.command[1], machine, **options)
        keys = jax.eval_shape(benchmark.measure, machine)
        if row.key not in keys:
            raise ValueError(f"no key {row.key!r}; there are {', '.join(keys)}")
    return lambda at: benchmark.measure(at)[row.key]


def check_same_machine(on: object, machine: Supernode) -> None:
    """Raise ValueError if a row names (`--on`) another machine than its constants are sought of."""
    if on is not None and load_machine(str(on)).name != machine.name:
        raise ValueError(f"--on {on} is another machine than {machine.name}, which is fitted")


def _posterior(
    machine, known: Uncertainty, rows, measures, noise, *, keep: Collection[str]
) -> Calibration:
    """The most probable constants, and the Laplace approximation around them."""
    keys, root = known.keys, np.linalg.cholesky(known.covariance)
    names, leaves = leaf_names(machine), jax.tree.leaves(machine)
    mean = np.log([float(leaves[names.index(key)]) for key in keys])
    measured = np.log([row.value for row in rows])

    with jax.enable_x64(True):

        def machine_at(theta) -> Supernode:
            changed = machine
            for key, value in zip(keys, jnp.exp(theta), strict=True):
                changed = replace_leaf(changed, key, value)
            return changed

        def distances(z):
            at = machine_at(jnp.asarray(mean) + jnp.asarray(root) @ z)
            found = jnp.stack([jnp.asarray(measure(at), float) for measure in measures])
            return (jnp.log(found) - measured) / noise

        off, slopes = on_host(distances), on_host(jax.jacrev(distances))

        def residuals(z):
            r = np.asarray(off(z))
            return np.concatenate([_robust(r), z])

        def jacobian(z):
            # d(rho)^(1/2)/dr = r / (rho^(1/2) sqrt(1 + r^2)), which is 1 at 0
            r, j = np.asarray(off(z)), np.asarray(slopes(z))
            ratio = np.sqrt((np.sqrt(1 + r * r) + 1) / 2) / np.sqrt(1 + r * r)
            return np.concatenate([ratio[:, None] * j, np.eye(len(z))])

        found = scipy.optimize.least_squares(
            residuals,
            np.zeros(len(keys)),
            jac=jacobian,  # pyright: ignore[reportArgumentType]
        )
        r, j = np.asarray(off(found.x)), np.asarray(slopes(found.x))
    weight = 1 / np.sqrt(1 + r * r)
    inverse = np.linalg.inv(np.eye(len(keys)) + (j * weight[:, None]).T @ j)
    covariance = root @ inverse @ root.T
    leverage = weight * np.sum((j @ inverse) * j, axis=1)
    values = np.exp(mean + root @ found.x)
    predicted = np.exp(r * noise + measured)
    calibrated = functools.reduce(
        lambda m, kv: replace_leaf(m, *kv), zip(keys, values.tolist(), strict=True), machine
    )
    kept = [
        i
        for i in range(len(keys))
        if keys[i] in keep or np.sqrt(covariance[i, i]) < _LEARNT * known.spread[i]
    ]
    results = tuple(Residual(row, float(p)) for row, p in zip(rows, predicted, strict=True))
    return Calibration(
        calibrated,
        {keys[i]: float(values[i]) for i in kept},
        Uncertainty(tuple(keys[i] for i in kept), covariance[np.ix_(kept, kept)]),
        known.spread[kept],
        results,
        _model_error(rows, r * noise / (1 - leverage)),
    )


def _robust(r):
    """A residual whose square is rho(r) = 2 (sqrt(1 + r^2) - 1)."""
    return np.sign(r) * np.sqrt(2 * r * r / (np.sqrt(1 + r * r) + 1))


def _model_error(
    rows: Sequence[Measurement], errors: Float[np.ndarray, "rows"]
) -> dict[str, float]:
    """Standard deviations by kind of operation: what is believed, and errors of logarithms.

    The rows' part is from their mean absolute error, which an outlier moves less than its square.
    """
    by_kind: dict[str, list[float]] = {}
    for row, error in zip(rows, errors, strict=True):
        if row.command[0] == "micro":
            by_kind.setdefault(_KIND[row.command[1]], []).append(abs(error))
    normal = float(np.sqrt(np.pi / 2))

    def spread(each: list[float]) -> float:
        total = len(each) * (normal * np.mean(each)) ** 2 + _ERROR_ROWS * _ERROR**2
        return float(np.sqrt(total / (len(each) + _ERROR_ROWS)))

    return {kind: spread(each) for kind, each in by_kind.items()}


def _check_agreement(rows: Sequence[Measurement]) -> None:
    first: dict[tuple, Measurement] = {}
    for row in rows:
        same = first.setdefault((row.command, row.key), row)
        if abs(np.log(row.value / same.value)) > np.log1p(_AGREE):
            raise ValueError(
                f"fit: row {row.row!r} says {row.key} {row.value:g}, and row {same.row!r} "
                f"{same.value:g} for the same command: more than {_AGREE:.0%} apart"
            )


def parse_options(arguments: Sequence[str]) -> dict[str, int | str]:
    """`--ep 8 --quant int8` as keyword arguments of a micro-benchmark."""
    if len(arguments) % 2 or any(not flag.startswith("--") for flag in arguments[::2]):
        raise ValueError(f"options must be pairs '--name value', got {' '.join(arguments)!r}")
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return {
        flag[2:].replace("-", "_"): int(value) if value.isdecimal() else value
        for flag, value in pairs
    }


def write_back(path: Path, found: Calibration, *, model_error: bool = False) -> None:
    """Put fitted values and their covariance into a machine's TOML file, leaving everything else.

    Args:
      model_error: also write what the rows show of the model's own error, as spreads of factors.
    Raises: ValueError: a constant that the file does not have.
    """
    text = read_text(path)
    factors = [key for key in found.values if key.startswith("factors.")]
    for dotted, value in found.values.items():
        if dotted in factors:
            continue
        table, _, key = dotted.rpartition(".")
        section = re.compile(
            rf'(?ms)(^\[{re.escape(table)}\](?:(?!^\[).)*?^{key} = {{ value = )("[^"]*"|[\d.]+)'
        )
        text, count = section.subn(lambda m, k=dotted, v=value: m[1] + _shown(k, v), text, count=1)
        if count != 1:
            raise ValueError(f"{path}: cannot find {dotted} to write it back")
    text = _without_table(text, "fit")
    lines = ["\n[fit]  # covariance of the logarithms of fitted constants, by cmjax fit"]
    lines += ["constants = [", *(f'  "{key}",' for key in found.uncertainty.keys), "]"]
    rows = (", ".join(f"{c:.4g}" for c in row) for row in found.uncertainty.covariance)
    lines += ["covariance = [", *(f"  [{row}]," for row in rows), "]"]
    kinds = found.model_error if model_error else {}
    if kinds or factors:
        entries = parse_toml(text, str(path)).get("factors", {})
        text = _without_table(text, "factors")
        said = "errors of rows that cmjax fit leaves out, one at a time"
        for kind, spread in kinds.items():
            entries[kind] = {"value": "100 %", "source": said, "spread": f"{spread:.1%}"}
        for key in factors:
            entry = entries.get(key[8:], {"spread": f"{_spread_of(key, found):.1%}"})
            entry |= {"value": f"{found.values[key]:.2%}", "source": "updated by cmjax fit --rows"}
            entries[key[8:]] = entry
        lines += ["", "[factors]  # time over the model's, by kind of operation"]
        for name, entry in entries.items():
            written = ", ".join(f'{k} = "{entry[k]}"' for k in ("value", "source", "spread"))
            lines.append(f"{name} = {{ {written} }}")
    replace_text(path, text.rstrip("\n") + "\n" + "\n".join(lines) + "\n")


def _spread_of(key: str, found: Calibration) -> float:
    return float(found.uncertainty.spread[found.uncertainty.keys.index(key)])


def _without_table(text: str, name: str) -> str:
    return re.sub(rf"(?ms)^\[{name}\].*?(?=^\[|\Z)", "", text)


def _shown(dotted: str, value: float) -> str:
    dimension = describe_key(dotted)
    if dimension == "number":
        return f"{value:.4g}"
    if dimension == "s":
        return f'"{value / UNITS["s"]["us"]:.4g} us"'
    if dimension == "fraction":
        return f'"{value:.2%}"'
    unit = {"bytes/s": "GB/s", "flop/s": "TFLOPS", "bytes": "GB"}[dimension]
    return f'"{value / UNITS[dimension][unit]:.5g} {unit}"'
