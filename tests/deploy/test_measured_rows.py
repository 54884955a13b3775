"""What is wrong with a measured row is said with its name, whoever reads it."""

import re

import pytest

from cmjax.cost.measured import Measurement
from cmjax.deploy.validation import compare, measure_of
from cmjax.hardware import load_machine

NAMED = "cloudmatrix384"
WRONG = [
    ("micro gemm --m x --k 64 --n 64", "us", "operator gemm: m must be a whole number, got 'x'"),
    ("micro gemm --m 64 --k 64", "us", "operator gemm"),
    ("micro gemm --m 64 --k 64 --n 64", "ms", "no key 'ms'"),
    ("predict decode --model tiny --npus 8 --load 0.5", "tpot_ms", "load must be at least 1"),
    (
        "predict decode --model tiny --npus 8 --laod 2",
        "tpot_ms",
        "cannot read the command",
    ),
    ("predict decode --model nothing --npus 8", "tpot_ms", "load_config: 'nothing' is neither"),
    ("predict prefill --model tiny --npus 8", "tpot_ms", "no key 'tpot_ms'"),
]


def _row(command, key="us"):
    return Measurement("a step", "predict", tuple(command.split()), key, 1.0, "here")


@pytest.mark.parametrize(("command", "key", "message"), WRONG)
def test_a_row_that_cannot_be_predicted_is_named(command, key, message):
    with pytest.raises(ValueError, match=f"^row 'a step': {re.escape(message)}"):
        compare(_row(command, key), NAMED)


@pytest.mark.parametrize(("command", "key", "message"), WRONG)
def test_a_row_that_cannot_be_fitted_to_is_named(command, key, message):
    with pytest.raises(ValueError, match=f"^row 'a step': {re.escape(message)}"):
        measure_of(_row(command, key), load_machine(NAMED))


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("micro gemm --m 64 --k 64 --n 64", "us"),
        ("predict decode --model tiny --npus 8", "tpot_ms"),
    ],
)
def test_a_row_of_another_machine_is_not_fitted_to(command, key):
    machine = load_machine(NAMED)
    message = f"^row 'a step': --on h800-pod is another machine than {NAMED}"
    with pytest.raises(ValueError, match=message):
        measure_of(_row(f"{command} --on h800-pod", key), machine)
    same = measure_of(_row(f"{command} --on {NAMED}", key), machine)
    assert same(machine) == measure_of(_row(command, key), machine)(machine)
