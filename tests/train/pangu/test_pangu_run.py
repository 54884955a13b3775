"""Training under a plan: one device's losses, exact resumption, and several processes."""

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from cmjax.processes import ProcessGroup
from tests.together import run_together
from train.metrics import MetricsLog, read_metrics
from train.pangu.__main__ import main
from train.pangu.config import PanguConfig
from train.pangu.run import plan_of

QUIET = Console(quiet=True)
SIZES = {
    "layers": 2, "hidden": 32, "heads": 2, "length": 32, "batch": 4, "steps": 6,
    "checkpoint_every": 3, "test_windows": 2,
}  # fmt: skip


def _config(out: Path, **changed) -> PanguConfig:
    return PanguConfig(**{**SIZES, "text": (), "out": out, **changed})


def _losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run on one device."""
    out = tmp_path_factory.mktemp("alone")
    main(_config(out), QUIET)
    return out


@pytest.mark.slow
def test_a_plan_learns_what_one_device_learns(alone, tmp_path):
    main(_config(tmp_path, plan="data=2,tensor=2,optimizer=zero1"), QUIET)
    assert _losses(tmp_path) == pytest.approx(_losses(alone), rel=1e-4)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_losses(alone, tmp_path, monkeypatch):
    write, made = MetricsLog.write, []

    def fourth(self, **values):
        write(self, **values)
        made.append(values)
        if len(made) == 4:  # after one checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", fourth)
        with pytest.raises(KeyboardInterrupt):
            main(_config(tmp_path), QUIET)
    main(_config(tmp_path), QUIET)
    assert _losses(tmp_path) == _losses(alone)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_one_goes_on_from_them(alone, tmp_path):
    """The checkpoint of two processes is taken up by one, which has both of its devices."""
    plan = "data=2,optimizer=zero1"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    run_together("train.pangu", [*options, "--plan", plan, "--out", str(tmp_path)])
    assert _losses(tmp_path) == pytest.approx(_losses(alone), rel=1e-4)
    shutil.rmtree(max((tmp_path / "checkpoints").iterdir()))
    (tmp_path / "metrics.jsonl").write_text("")
    main(_config(tmp_path, plan=plan), QUIET)
    assert _losses(tmp_path) == pytest.approx(_losses(alone)[3:], rel=1e-4)


def test_a_search_gives_a_plan_of_as_many_devices(tmp_path):
    plan = plan_of(_config(tmp_path, plan="search", devices=2), 256)
    assert plan.devices == 2


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"plan": "data=3"}, "data=3 x micro_batch=1 does not divide the global batch of 4"),
        ({"plan": "dta=2"}, "unknown name 'dta'; closest: data"),
        ({"vocabulary": Path("/nowhere/at.model")}, "--vocabulary /nowhere/at.model: there is no"),
        ({"text": (Path("/nowhere/text"),)}, "--text /nowhere/text: cannot be read"),
        ({"group": ProcessGroup(coordinator="host:1")}, "--processes is missing"),
    ],
)
def test_what_cannot_be_trained_is_refused(changed, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        main(_config(tmp_path, **changed), QUIET)
