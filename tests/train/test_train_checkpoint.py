"""Checkpoints: whole or not there."""

import hashlib
import os
import re
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.console import exit_code
from cmjax.interrupt import Terminated
from train import checkpoint
from train.checkpoint import Damaged, SaveFailed, latest, save
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


def test_the_last_two_are_kept(tmp_path):
    for step in range(4):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000003"]
    found = latest(tmp_path)
    assert found is not None and found.progress["step"] == 3


def _array_file(path):
    """The largest file of the arrays: their values."""
    return max((path / "arrays").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "an empty run.json": (lambda p: (p / "run.json").write_text(""), r"run\.json is empty"),
    "half a run.json": (lambda p: (p / "run.json").write_text('{"con'), r"run\.json is damaged"),
    "a list": (lambda p: (p / "run.json").write_text("[]"), r"run\.json is damaged"),
    "no progress": (lambda p: (p / "run.json").write_text("{}"), r"run\.json is damaged"),
    "no run.json": (lambda p: (p / "run.json").unlink(), r"run\.json cannot be read"),
    "another step": (
        lambda p: (p / "run.json").write_text(
            (p / "run.json").read_text().replace('"step": 1', '"step": 9')
        ),
        r"run\.json is not what was written",
    ),
    "a truncated array": (
        lambda p: os.truncate(_array_file(p), _array_file(p).stat().st_size // 2),
        r"arrays/.* has \d+ of \d+ bytes",
    ),
    "an empty array": (lambda p: os.truncate(_array_file(p), 0), r"arrays/.* has 0 of \d+ bytes"),
    "a flipped bit": (lambda p: _flip(_array_file(p)), r"arrays/.* its checksum differs"),
    "no checksums": (
        lambda p: os.truncate(p / "SHA256SUMS", 0),
        r"SHA256SUMS does not list arrays/",
    ),
    "half the checksums": (
        lambda p: os.truncate(p / "SHA256SUMS", (p / "SHA256SUMS").stat().st_size * 3 // 4),
        "SHA256SUMS is truncated",
    ),
    "no arrays": (lambda p: shutil.rmtree(p / "arrays"), r"arrays/.* cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, damage):
    harm, message = DAMAGES[damage]
    older, newer = _save(tmp_path, 0), _save(tmp_path, 1)
    harm(newer)
    said = []
    found = latest(tmp_path, said.append)
    assert found is not None and found.path == older and found.progress["step"] == 0
    np.testing.assert_array_equal(found.arrays(ARRAYS)["a"], ARRAYS["a"])
    (line,) = said
    assert re.search(f"00000001/.*{message}.*: going back to {re.escape(str(older))}", line)
    harm_older, _ = DAMAGES["an empty run.json"]
    harm_older(older)
    with pytest.raises(Damaged, match=rf"no whole checkpoint: .*{message}.*00000000/run\.json is"):
        latest(tmp_path)


def test_a_damaged_one_does_not_crowd_out_a_good_one(tmp_path):
    older, newer = _save(tmp_path, 0), _save(tmp_path, 1)
    os.truncate(newer / "run.json", 0)
    last = _save(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == [older, last]


def test_one_without_checksums_is_read_and_its_damage_named(tmp_path):
    """As written before there were any."""
    path = _save(tmp_path)
    (path / "SHA256SUMS").unlink()
    found = latest(tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found.arrays(ARRAYS)["a"], ARRAYS["a"])
    os.truncate(_array_file(path), 3)
    with pytest.raises(Damaged, match=r"00000000/arrays cannot be read"):
        found.arrays(ARRAYS)


def test_checksums_are_those_of_sha256sum(tmp_path):
    path = _save(tmp_path)
    lines = (path / "SHA256SUMS").read_text().splitlines()
    own = dict(reversed(line.split("  ")) for line in lines if not line.startswith("#"))
    assert own["run.json"] == hashlib.sha256((path / "run.json").read_bytes()).hexdigest()
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(own) == files - {"SHA256SUMS"}


def test_everything_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    synced, replace = set(), os.replace

    def sync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def rename(source, target):
        if Path(source).parent == tmp_path:
            assert {str(p) for p in Path(source).rglob("*")} | {str(source)} <= synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    _save(tmp_path)
    assert str(tmp_path) in synced  # the rename itself


def test_a_count_of_the_progress_is_checked(tmp_path):
    _save(tmp_path, 7)
    found = latest(tmp_path)
    assert found is not None and found.count("step", 7) == 7
    with pytest.raises(Damaged, match=r"run\.json: step must be 0 to 6, got 7"):
        found.count("step", 6)
    with pytest.raises(Damaged, match="stage must be 0 to 3, got None"):
        found.count("stage", 3)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_waits_for_the_save(tmp_path, monkeypatch, number, raised):
    write = checkpoint.ocp.StandardCheckpointer.save

    def interrupted(self, *args):
        signal.raise_signal(number)
        write(self, *args)

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", interrupted)
    caught = []

    def run():
        try:
            _save(tmp_path)
        except KeyboardInterrupt as error:
            caught.append(type(error))
            raise

    assert exit_code(run) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert caught == [raised]
    found = latest(tmp_path)
    assert found is not None and found.progress == {"step": 1}


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
