"""Kills of whole trainings: after any signal at any moment a run goes on to the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cmjax.console import exit_code
from cmjax.interrupt import Terminated, finished_first
from train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "moe_lm": (
        "--hidden 32 --layers 2 --heads 2 --experts 4 --expert-ffn 32 --length 16 --batch 4 "
        "--steps 40 --checkpoint-every 1 --test-windows 2"
    ),
    "rsq_asr": (
        "--voices 2 --batch 4 --dfsmn.width 8 --dfsmn.hidden 12 --dfsmn.kernel 3 --dfsmn.blocks 1 "
        "--dfsmn.strides 4 --dfsmn.lookback 2 --dfsmn.lookahead 1 --strings.longest 1 "
        "--float-stage.steps 40 --quant.precision float32 --checkpoint-every 1"
    ),
}


def test_signals_wait_for_what_is_to_be_finished():
    done = []

    def run():
        with finished_first():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            done.append("whole")
        done.append("beyond")

    assert exit_code(run) == 143 and done == ["whole"]


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt, 130, "interrupted"),
        (Terminated, 143, "terminated"),
        (ValueError("bad"), 2, "error: bad"),
        (OSError("full"), 1, "error: full"),
    ],
)
def test_a_training_says_one_line_and_its_exit_code(raised, code, line, capsys):
    def run():
        raise raised

    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(run) == code
    assert capsys.readouterr().err == line + "\n"
    assert signal.getsignal(signal.SIGTERM) is before


def _begin(program: str, folder: Path, out: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    arguments = [*PROGRAMS[program].split(), "--out", str(folder / out)]
    if program == "rsq_asr":
        arguments += ["--compiled", str(folder / "compiled")]
    return subprocess.Popen(
        [sys.executable, "-m", f"train.{program}", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def _finish(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


def _losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_in_any_moment_ends_in_one_line_and_a_run_that_goes_on(program, tmp_path):
    """A checkpoint is written after every step, so that most moments are in one."""
    _finish(_begin(program, tmp_path, "whole"))
    kinds = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
    kinds.append((signal.SIGKILL, -9, None))
    for moment in range(10):
        number, code, line = kinds[moment % len(kinds)]
        process = _begin(program, tmp_path, "stopped")
        before = len(_losses(tmp_path / "stopped"))
        deadline = time.monotonic() + 300
        while len(_losses(tmp_path / "stopped")) < before + 1 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.013 * moment)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code, said
        if line is not None:
            assert said.splitlines()[-1:] == [line] and "Traceback" not in said, said
    _finish(_begin(program, tmp_path, "stopped"))
    assert _losses(tmp_path / "stopped") == _losses(tmp_path / "whole")
