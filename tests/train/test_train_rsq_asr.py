"""The command line of the speech recognition run: its exit codes and its one line of an error."""

import pytest

from cmjax import processes
from tests.together import free_address
from train import rsq_asr
from train.checkpoint import SaveFailed
from train.metrics import LossNotFinite


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "fsdd", "--data-dir", "ABSENT"], "no folder"),
        (["--data", "librispeech", "--data-dir", "ABSENT"], "no *.trans.txt under"),
        (["--data", "kaldi", "--data-dir", "ABSENT"], "wav.scp"),
        (["--data", "yesno", "--data-dir", "."], "no recordings"),
        (["--data", "fsdd", "--data-dir", "."], "no recordings"),
        (["--evaluate-only"], "no checkpoint in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [str(tmp_path / "absent") if a == "ABSENT" else a for a in arguments]
    assert rsq_asr.main([*arguments, "--out", "out", "--compiled", "None"]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "fsdd"], "--data fsdd needs --data-dir"),
        (["--batch", "3", "--devices", "2"], "--batch (3) must be a multiple of --devices (2)"),
        (["--perturb.noise-share", "2"], "noise_share must lie in [0, 1]"),
        (["--steps", "2"], "--steps"),
    ],
)
def test_bad_options_are_named_with_exit_code_2(arguments, message, capsys):
    assert rsq_asr.main(arguments) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert message in printed


def test_a_coordinator_that_nobody_answers_at_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(processes, "PATIENCE_S", 0.5)
    address = free_address()
    where = ["--coordinator", address, "--processes", "2", "--process-id", "1"]
    assert rsq_asr.main(["--devices", "2", *where]) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"error: --coordinator {address}: nobody answers there")


@pytest.mark.parametrize("error", [LossNotFinite("the loss is not finite"), SaveFailed("full")])
def test_a_run_that_fails_is_one_line_and_exit_code_1(error, monkeypatch, capsys):
    def fail(config, console):
        raise error

    monkeypatch.setattr(rsq_asr, "train_and_test", fail)
    assert rsq_asr.main([]) == 1
    assert capsys.readouterr().err == f"error: {error}\n"
