"""Checkpoints: whole or not there."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from train import checkpoint
from train.checkpoint import SaveFailed, latest, save
from train.metrics import MetricsLog, read_metrics

ARRAYS = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.array(3)}}


def _save(folder, step=1, **changed):
    options = {"config": {"x": 1, "y": {"z": [1, 2]}}, "progress": {"step": step}}
    return save(folder, ARRAYS, **{**options, **changed})


def test_what_is_saved_is_what_is_read(tmp_path):
    _save(tmp_path / "run")
    found = latest(tmp_path / "run")
    assert found is not None and found.progress == {"step": 1}
    read = found.arrays(ARRAYS)
    np.testing.assert_array_equal(read["a"], ARRAYS["a"])
    assert read["b"]["c"] == 3 and read["b"]["c"].dtype == ARRAYS["b"]["c"].dtype


def test_the_last_one_is_kept(tmp_path):
    for step in range(3):
        _save(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]
    found = latest(tmp_path)
    assert found is not None and found.progress["step"] == 2


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    good = _save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", full)
    with pytest.raises(SaveFailed, match=r"No space left on device.*last good one is"):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    found = latest(tmp_path)
    assert found is not None and found.progress["step"] == 1
    np.testing.assert_array_equal(found.arrays(ARRAYS)["a"], ARRAYS["a"])


def test_a_half_written_one_is_no_checkpoint(tmp_path):
    good = _save(tmp_path, 1)
    partial = tmp_path / "00000001.partial"
    shutil.copytree(good, partial)
    (partial / "run.json").unlink()
    found = latest(tmp_path)
    assert found is not None and found.path == good
    assert _save(tmp_path, 2).name == "00000001" and not partial.exists()


def test_nothing_saved_is_no_checkpoint(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None


def test_another_configuration_is_refused_with_the_fields_that_differ(tmp_path):
    _save(tmp_path)
    found = latest(tmp_path)
    assert found is not None
    found.check_config({"x": 1, "y": {"z": [1, 2]}})
    found.check_config({"x": 5, "y": {"z": [1, 2]}}, ignore=("x",))
    with pytest.raises(ValueError, match=r"y\.z: \[1, 2\] there, \[1, 3\] here"):
        found.check_config({"x": 1, "y": {"z": [1, 3]}})
    with pytest.raises(ValueError, match="new: None there, 7 here"):
        found.check_config({"x": 1, "y": {"z": [1, 2]}, "new": 7})


def test_metrics_survive_a_torn_line_and_drop_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(5):
        log.write(step=step, loss=0.5)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert len(read_metrics(path)) == 5
    MetricsLog(path, keep=3).write(step=3, loss=0.25)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3]
    path.write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not JSON"):
        read_metrics(path)
