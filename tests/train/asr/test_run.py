"""The training run on a tiny network: resumption, devices, stages, and what stops it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from cmjax.models.asr.dfsmn import ConvDFSMNConfig
from tests.together import run_together
from train import checkpoint
from train.asr import run as module
from train.asr import task as task_module
from train.asr.config import Config, FloatStage, Loss, QuantStage
from train.asr.learner import Learner, make_step, optimiser, take_apart
from train.asr.run import measure, start, train
from train.asr.task import prepare
from train.data.batches import TrainingStream
from train.data.strings import Strings
from train.metrics import LossNotFinite, read_metrics

pytestmark = pytest.mark.slow  # every test compiles a training step

ROOT = Path(__file__).parents[3]
QUIET = Console(quiet=True)
TINY = ConvDFSMNConfig(
    strides=(4,), width=8, hidden=12, kernel=3, blocks=1, lookback=2, lookahead=1
)


def _config(out: Path, **changed) -> Config:
    options = {
        "voices": 2,
        "dfsmn": TINY,
        "batch": 4,
        "strings": Strings(longest=1, edge_s=(0.0, 0.1)),
        "float_stage": FloatStage(steps=6),
        "quant": QuantStage(algorithm="F(2,3)", scale_steps=2, steps=2, calibration_batches=2),
        "checkpoint_every": 2,
        "compiled": None,
        "out": out,
    }
    return Config(**{**options, **changed})


def _losses(out: Path) -> list[tuple[int, str, float, float]]:
    lines = read_metrics(out / "metrics.jsonl")
    return [(line["step"], line["stage"], line["loss"], line["gradient_norm"]) for line in lines]


@pytest.fixture(scope="module", autouse=True)
def few_strings():
    """Runs of this file test on few strings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_module, "TEST_STRINGS", 8)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from the beginning to the end, and the error rates after it."""
    out = tmp_path_factory.mktemp("whole")
    run = start(_config(out), QUIET)
    train(run, QUIET)
    return out, measure(run)


def test_a_run_goes_through_every_stage_and_reports_both_networks(whole):
    out, results = whole
    assert [stage for _, stage, _, _ in _losses(out)] == ["float"] * 6 + ["scales"] * 2 + [
        "all"
    ] * 2
    assert list(results) == ["float32", "int8-winograd"]
    assert set(results["float32"]) == {"test", "test strings"}
    written = json.loads((out / "results.json").read_text())
    wanted = results["int8-winograd"]["test strings"].words.rate
    assert written["int8-winograd"]["test strings"]["wer"] == wanted


def test_stopped_in_any_stage_a_run_goes_on_to_the_same_losses_bit_for_bit(
    whole, tmp_path, monkeypatch
):
    class Stopped(Exception):
        pass

    for last in (3, 7, 9):  # in each of the stages
        write = module.MetricsLog.write

        def stop(self, last=last, write=write, **values):
            if values["step"] == last:
                raise Stopped
            write(self, **values)

        out = tmp_path / f"{last}"
        monkeypatch.setattr(module.MetricsLog, "write", stop)
        with pytest.raises(Stopped):
            train(start(_config(out), QUIET), QUIET)
        monkeypatch.setattr(module.MetricsLog, "write", write)
        train(start(_config(out), QUIET), QUIET)
        assert _losses(out) == _losses(whole[0])


def test_a_finished_run_is_only_tested_again(whole):
    out, results = whole
    before = (out / "metrics.jsonl").read_text()
    run = start(dataclasses.replace(_config(out), evaluate_only=True), QUIET)
    assert run.done
    again = measure(run)
    for precision, by_set in results.items():
        for name, result in by_set.items():
            assert again[precision][name].words == result.words
    assert (out / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_configuration_is_refused_by_name(whole):
    out, _ = whole
    other = dataclasses.replace(_config(out), dfsmn=dataclasses.replace(TINY, width=16), seed=3)
    with pytest.raises(ValueError, match=r"dfsmn\.width: 8 there, 16 here; seed: 0 there, 3 here"):
        start(other, QUIET)


def test_only_scales_move_in_their_stage(tmp_path):
    run = start(_config(tmp_path), QUIET)
    seen = {}
    finish = module._finish_stage

    def watch(run, stream, console):
        seen[run.stage] = (run.model, run.learner)
        finish(run, stream, console)

    module._finish_stage = watch
    try:
        train(run, QUIET)
    finally:
        module._finish_stage = finish
    before = take_apart(seen[1][0])[1]
    after = seen[1][1].params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    assert all(jax.tree.leaves(same["weights"]))
    moved = same["scales"]["layers"][1]["expand"]
    assert not moved["filter_step"] and not moved["point_step"]
    assert all((x > 0).all() for x in jax.tree.leaves(after["scales"]))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path, monkeypatch):
    pack = module.TrainingStream.at

    def poisoned(self, step, *rows):
        names, batch = pack(self, step, *rows)
        if step == 3:
            batch.samples[1, :200] = np.nan
        return names, batch

    monkeypatch.setattr(module.TrainingStream, "at", poisoned)
    with pytest.raises(LossNotFinite, match="not finite at step 3"):
        train(start(_config(tmp_path), QUIET), QUIET)
    record = json.loads((tmp_path / "bad_batch.json").read_text())
    monkeypatch.undo()
    task = prepare(_config(tmp_path))
    stream = TrainingStream(
        task.corpus,
        task.framing,
        batch=4,
        strings=_config(tmp_path).strings,
        augment=_config(tmp_path).perturb,
        seed=0,
    )
    assert record["utterances"] == list(stream.at(3)[0]) and record["step"] == 3
    kept = checkpoint.latest(tmp_path / "checkpoints")
    assert kept is not None and kept.progress["step"] == 2  # the last one before it is good


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_share_a_batch_to_the_same_loss_and_parameters(tmp_path, devices):
    one = _config(tmp_path)
    task = prepare(one)
    network, params = take_apart(task.model(one))
    transform = optimiser(4, 1e-2, 0.0, 0.0)
    stream = TrainingStream(
        task.corpus, task.framing, batch=4, strings=one.strings, augment=one.perturb, seed=0
    )
    outcomes = []
    for config in (one, dataclasses.replace(one, devices=devices)):
        step = make_step(network, transform, task.framing, config, weights=Loss())
        learner, losses = Learner(params, transform.init(params)), []
        for n in range(2):
            key = jax.random.fold_in(jax.random.key(0), n)
            learner, parts, _ = jax.block_until_ready(step(learner, stream.at(n)[1], key))
            losses.append(float(parts.task))
        outcomes.append((losses, jax.device_get(learner.params)))
    np.testing.assert_allclose(outcomes[0][0], outcomes[1][0], rtol=1e-5)
    # The mean gradient is a sum in another order; Adam divides it by its own size, so a parameter
    # whose gradient is all rounding may move a little differently, by a share of the rate 1e-2.
    for a, b in zip(*(jax.tree.leaves(o[1]["weights"]) for o in outcomes), strict=True):
        assert np.abs(a - b).max() < 1e-3


def test_two_processes_learn_what_one_learns_and_one_goes_on_from_them(tmp_path):
    """Through all stages; the checkpoint is of the last."""
    config = _config(tmp_path / "alone", devices=2, compiled=tmp_path / "compiled")
    train(start(config, QUIET), QUIET)
    together = dataclasses.replace(config, out=tmp_path / "together")
    printed = run_together("train.rsq_asr", _options(together))
    assert "Error rates" in printed[0] and printed[1] == ""
    np.testing.assert_allclose(_numbers(together.out), _numbers(config.out), rtol=1e-4)
    shutil.rmtree(max((together.out / "checkpoints").iterdir()))
    train(start(together, QUIET), QUIET)
    np.testing.assert_allclose(_numbers(together.out), _numbers(config.out), rtol=1e-4)


def _numbers(out: Path) -> list[tuple[float, float]]:
    return [(loss, norm) for _, _, loss, norm in _losses(out)]


def _options(options: Any, above: str = "--") -> list[str]:
    """A configuration as the command line says it, but for its lists and processes."""
    said = []
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), above + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value) and field.name not in ("group", "decoding"):
            said += _options(value, name + ".")
        elif isinstance(value, tuple) and value:
            said += [name, *map(str, value)]
        elif isinstance(value, int | float | str | Path) and not isinstance(value, bool):
            said.append(f"{name}={value}")
    return said


def test_a_run_on_two_devices_goes_on_from_a_checkpoint(tmp_path):
    config = _config(
        tmp_path, devices=2, quant=QuantStage(precision="float32"), float_stage=FloatStage(steps=4)
    )
    stopped = start(config, QUIET)
    save = module._save

    class Stopped(Exception):
        pass

    def save_and_stop(run):
        save(run)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_save", save_and_stop)
        with pytest.raises(Stopped):
            train(stopped, QUIET)
    run = start(config, QUIET)
    assert run.position == 2
    train(run, QUIET)
    assert [step for step, *_ in _losses(tmp_path)] == [0, 1, 2, 3]
    assert set(measure(run)) == {"float32"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "fsdd"}, "--data fsdd needs --data-dir"),
        ({"data_dir": Path("x")}, "need --data"),
        ({"batch": 5, "devices": 2}, "multiple of --devices"),
        ({"checkpoint_every": 0}, "--checkpoint-every"),
        ({"loss": {"local": -1.0}}, "local must not be negative"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        if "loss" in options:
            options = {"loss": Loss(**options["loss"])}
        _config(tmp_path, **options)


def test_evaluating_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--evaluate-only: no checkpoint"):
        start(_config(tmp_path, evaluate_only=True), QUIET)


_ARGUMENTS = (
    "--voices 2 --batch 4 --dfsmn.width 8 --dfsmn.hidden 12 --dfsmn.kernel 3 --dfsmn.blocks 1 "
    "--dfsmn.strides 4 --dfsmn.lookback 2 --dfsmn.lookahead 1 --strings.longest 1 "
    "--quant.algorithm F(2,3) --float-stage.steps 12 --quant.scale-steps 4 "
    "--quant.steps 4 --quant.calibration-batches 2 --checkpoint-every 3"
).split()


def test_killed_a_run_goes_on_to_the_same_losses_bit_for_bit(tmp_path):
    def begin(out: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment.pop("XLA_FLAGS", None)
        arguments = [*_ARGUMENTS, "--out", str(tmp_path / out), "--compiled", str(tmp_path / "c")]
        return subprocess.Popen(
            [sys.executable, "-m", "train.rsq_asr", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            cwd=tmp_path,
        )

    assert begin("whole").wait(timeout=900) == 0
    for last in (5, 14):
        process = begin("killed")
        deadline = time.monotonic() + 900
        while len(read_metrics(tmp_path / "killed" / "metrics.jsonl")) < last:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert begin("killed").wait(timeout=900) == 0
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "killed")]
    rates = [{p: {s: r["wer"] for s, r in d.items()} for p, d in x.items()} for x in results]
    assert rates[0] == rates[1]
