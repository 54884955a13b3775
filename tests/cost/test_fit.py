"""Calibration: planted constants are found again, and the catalog holds what the fit finds."""

import dataclasses
import re
import shutil
from importlib import resources

import jax
import numpy as np
import pytest

from cmjax.cost.fit import (
    Calibration,
    fit,
    fitted_keys,
    fitted_prior,
    parse_options,
    update,
    write_back,
)
from cmjax.cost.measured import COLUMNS, Measurement, measured_machines, read_measurements
from cmjax.cost.micro import micro
from cmjax.hardware import Uncertainty, leaf_names, load_machine, replace_leaf, uncertainty

HEADER = ",".join(COLUMNS)
GOOD = "a row,calibrate,micro gemm --m 8 --k 8 --n 8,us,12.5,somewhere"


def value(machine, dotted):
    leaves = zip(leaf_names(machine), jax.tree.leaves(machine), strict=True)
    return float(dict(leaves)[dotted])


def unknown(*keys, spread=100.0):
    """Constants of which next to nothing is known."""
    return Uncertainty(keys, spread**2 * np.eye(len(keys)))


def test_planted_constants_are_recovered_from_synthetic_measurements():
    machine = load_machine("h800-pod")
    planted = {
        "chip.matrix_startup_s": 3e-6,
        "exchange.bandwidth": 0.5,
        "exchange.dispatch_startup_s": 40e-6,
        "exchange.combine_startup_s": 11e-6,
        "efficiency.gemm": 0.42,
        "efficiency.hbm": 0.61,
    }
    truth = machine
    for key, number in planted.items():
        truth = replace_leaf(truth, key, number)
    commands = [
        "micro dispatch --ep 8 --tokens 16",
        "micro dispatch --ep 64 --tokens 128",
        "micro combine --ep 8 --tokens 16",
        "micro combine --ep 64 --tokens 128",
        "micro gemm --m 8192 --k 7168 --n 4096",
        "micro gemm --m 16 --k 64 --n 64",
        "micro gemm --m 16 --k 7168 --n 4096",
        "micro gemm --m 64 --k 7168 --n 4096 --quant bf16",
    ]

    def measure(command):
        _, operator, *options = command.split()
        with jax.enable_x64(True):
            return float(micro(operator, truth, **parse_options(options)).measure(truth)["us"])

    rows = [
        Measurement(c, "calibrate", tuple(c.split()), "us", measure(c), "synthetic")
        for c in commands
    ]
    found = fit(machine, unknown(*planted), rows)
    assert found.values == pytest.approx(planted, rel=1e-4)
    assert all(abs(residual.error) < 1e-6 for residual in found.residuals)
    assert {key: value(found.machine, key) for key in planted} == found.values
    untouched = replace_leaf(found.machine, "chip", machine.chip)
    assert untouched.fabric == machine.fabric


@pytest.mark.parametrize("name", [name for name in measured_machines() if fitted_keys(name)])
def test_the_catalog_holds_what_the_fit_finds_now(name):
    machine, keys = load_machine(name), fitted_keys(name)
    found = fit(*fitted_prior(name), read_measurements(name))
    # The catalog shows four digits.
    assert found.values == pytest.approx({key: value(machine, key) for key in keys}, rel=1e-2)


def test_the_models_own_error_is_that_of_rows_which_the_fit_has_not_seen():
    machine, before = load_machine("h800-pod"), unknown("efficiency.gemm")
    command = ("micro", "gemm", "--m", "4096", "--k", "7168", "--n", "4096")
    us = float(micro("gemm", machine, **parse_options(command[2:])).measure(machine)["us"])
    off = np.array([0.02, -0.01, 0.015, -0.02])
    rows = [
        Measurement(f"row {i}", "calibrate", command, "us", us * np.exp(x), "synthetic")
        for i, x in enumerate(off)
    ]
    # without a row the fit is the mean of the others
    unseen = [np.delete(off, i).mean() - x for i, x in enumerate(off)]
    of_rows = np.sqrt(np.pi / 2) * np.mean(np.abs(unseen))
    found = fit(machine, before, rows).model_error["matrix"]
    assert 2 * found**2 - 0.1**2 == pytest.approx(of_rows**2, rel=0.05)


def test_prediction_rows_change_nothing():
    rows = read_measurements("h800-pod")
    assert any(row.role == "predict" for row in rows)
    keys = unknown("efficiency.gemm")
    some = [r for r in rows if r.command[1] == "gemm"][:2]
    end_to_end = [r for r in rows if r.role == "predict"]
    machine = load_machine("h800-pod")
    assert fit(machine, keys, some).values == fit(machine, keys, some + end_to_end).values


def test_an_end_to_end_row_may_not_calibrate():
    row = next(r for r in read_measurements("cloudmatrix384") if r.command[0] == "predict")
    row = dataclasses.replace(row, role="calibrate")
    message = f"fit: row {row.row!r} is end-to-end; only micro rows may calibrate"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fit(load_machine("cloudmatrix384"), unknown("efficiency.gemm"), [row])


@pytest.mark.parametrize("name", measured_machines())
def test_built_in_end_to_end_rows_are_predictions(name):
    for row in read_measurements(name):
        assert row.command[0] == "micro" or row.role == "predict", row.row


def test_a_fit_of_nothing_or_to_nothing_is_refused():
    rows = read_measurements("cloudmatrix384")
    machine = load_machine("cloudmatrix384")
    with pytest.raises(ValueError, match=r"^fit: cloudmatrix384 has 0 rows to calibrate 1 fitted "):
        fit(machine, unknown("efficiency.gemm"), [])
    message = r"^fit: \S+ has \d+ rows to calibrate 0 fitted constants; "
    with pytest.raises(ValueError, match=message):
        fit(machine, unknown(), rows)


def test_fitted_values_are_written_back_and_nothing_else(tmp_path):
    path = tmp_path / "machine.toml"
    with resources.as_file(
        resources.files("cmjax.hardware") / "catalog" / "h800-pod.toml"
    ) as original:
        shutil.copy(original, path)
        before = original.read_text("utf-8").splitlines()
    values = {"chip.matrix_startup_s": 3.25e-6, "exchange.bandwidth": 0.625}
    write_back(path, found_of(values))
    machine = load_machine(path)
    for key, number in values.items():
        assert value(machine, key) == pytest.approx(number, rel=1e-9)
    after = path.read_text("utf-8").splitlines()
    end = next(i for i, line in enumerate(before) if line.startswith("[fit]"))
    changed = [old for old, new in zip(before[:end], after[:end], strict=True) if old != new]
    assert [line.split()[0] for line in changed] == ["matrix_startup_s", "bandwidth"]
    assert uncertainty(path).joint == tuple(values)
    at = [uncertainty(path).keys.index(key) for key in values]
    want = found_of(values).uncertainty.covariance
    assert uncertainty(path).covariance[np.ix_(at, at)] == pytest.approx(want)
    with pytest.raises(ValueError, match=r": cannot find chip\.speed to write it back$"):
        write_back(path, found_of({"chip.speed": 1.0}))


def found_of(values):
    count = len(values)
    covariance = 0.01 * np.eye(count) + 0.002
    return Calibration(None, values, Uncertainty(tuple(values), covariance), np.ones(count), (), {})


def test_options_of_a_command_are_read():
    assert parse_options(["--ep", "8", "--kv-cache", "int8"]) == {"ep": 8, "kv_cache": "int8"}
    assert parse_options([]) == {}
    for bad in (["--ep"], ["ep", "8"], ["--ep", "8", "9"]):
        with pytest.raises(ValueError, match=r"^options must be pairs '--name value', got "):
            parse_options(bad)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], f"expected the columns {', '.join(COLUMNS)}; found nothing"),
        (["row,command"], f"expected the columns {', '.join(COLUMNS)}; found row, command"),
        ([HEADER], "no rows"),
        ([HEADER, GOOD, "a,b"], "line 3: expected 6 columns"),
        ([HEADER, GOOD + ",more"], "line 2: expected 6 columns"),
        (
            [HEADER, GOOD.replace("calibrate", "train")],
            "line 2: role must be calibrate or predict, got 'train'",
        ),
        ([HEADER, GOOD.replace("12.5", "x")], "line 2: value must be a number, got 'x'"),
        ([HEADER, GOOD.replace("12.5", "-1")], "line 2: value must be positive, got '-1'"),
        ([HEADER, GOOD.replace("12.5", "0")], "line 2: value must be positive, got '0'"),
        ([HEADER, GOOD.replace("12.5", "nan")], "line 2: value must be positive, got 'nan'"),
        ([HEADER, GOOD.replace("12.5", "inf")], "line 2: value must be positive, got 'inf'"),
        (
            [HEADER, GOOD.replace("micro", "macro")],
            "line 2: command must start with 'micro OPERATOR' or 'predict decode|prefill', got "
            "'macro gemm --m 8 --k 8 --n 8'",
        ),
        ([HEADER, "a,predict,predict,us,1,b"], "line 2: command must start with 'micro OPERATOR'"),
    ],
)
def test_bad_measurements_are_refused_by_file_and_line(lines, message, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    start = f"{path} " if message.startswith("line") else f"{path}: "
    with pytest.raises(ValueError, match=f"^{re.escape(start + message)}"):
        read_measurements(str(path))


def test_good_measurements_are_read_from_a_users_file(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(f"{HEADER}\n{GOOD}\n", encoding="utf-8")
    (row,) = read_measurements(str(path))
    assert row.command == ("micro", "gemm", "--m", "8", "--k", "8", "--n", "8")
    assert (row.role, row.key, row.value, row.source) == ("calibrate", "us", 12.5, "somewhere")


def test_missing_measurements_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^measurements .*none\.csv: cannot be read"):
        read_measurements(str(tmp_path / "none.csv"))
    known = ", ".join(measured_machines())
    with pytest.raises(ValueError, match=f"^no measurements of 'h900'; built in: {known}$"):
        read_measurements("h900")


def own_rows(*values, command="micro gemm --m 4096 --k 7168 --n 4096"):
    return [
        Measurement(f"row {i}", "predict", tuple(command.split()), "us", value, "mine")
        for i, value in enumerate(values)
    ]


def efficiency_measure(machine):
    """A time that is linear in the inverse of one constant."""
    return 100.0 / machine.efficiency.gemm


def test_an_update_is_the_conjugate_normal_posterior():
    machine = load_machine("cloudmatrix384")
    spread, noise = 0.1, 0.1
    before = unknown("efficiency.gemm", "efficiency.hbm", spread=spread)
    mean = np.log(machine.efficiency.gemm)
    # So near the prior that the robust loss is quadratic.
    seen = mean + np.array([0.0010, 0.0014, 0.0012])
    rows = own_rows(*(100.0 / np.exp(seen)))
    found = update(machine, before, rows, [efficiency_measure] * 3, noise=noise)
    precision = 1 / spread**2 + 3 / noise**2
    want = (mean / spread**2 + seen.sum() / noise**2) / precision
    assert np.log(found.values["efficiency.gemm"]) == pytest.approx(want, abs=1e-6)
    assert found.uncertainty.spread == pytest.approx([precision**-0.5], rel=1e-3)
    assert list(found.values) == ["efficiency.gemm"]  # the other one they say nothing of


def test_rows_that_say_nothing_are_refused():
    machine = load_machine("cloudmatrix384")
    with pytest.raises(ValueError, match="identify no constant of cloudmatrix384"):
        update(machine, unknown("efficiency.hbm", spread=0.1), own_rows(5.0), [efficiency_measure])
    with pytest.raises(ValueError, match=r"^fit: no rows$"):
        update(machine, unknown("efficiency.hbm"), [], [])


def test_rows_that_contradict_each_other_are_named():
    machine, rows = load_machine("cloudmatrix384"), own_rows(100.0, 130.0)
    message = "fit: row 'row 1' says us 130, and row 'row 0' 100 for the same command"
    with pytest.raises(ValueError, match=f"^{message}"):
        update(machine, unknown("efficiency.gemm"), rows, [efficiency_measure] * 2)
