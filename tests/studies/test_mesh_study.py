"""What the study of meshes claims: equal bytes and logits on 8 ranks, on 64 and 384, and hangs."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from studies import mesh as study
from studies import mesh_worker
from studies.mesh import LINKS, Study, byte_table, faults, run_worker, time_table, write_plan
from studies.mesh_figure import plot_meshes


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """8 ranks on 2 nodes in this process, each phase counted; one kind of layer compiles sooner."""
    folder = tmp_path_factory.mktemp("mesh")
    config = dataclasses.replace(mesh_worker.small_model(), layers=2, dense_layers=(), heads=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_worker, "small_model", lambda: config)
        plan = write_plan(8, folder)
        options = mesh_worker.Worker(mesh="2x2x2", plan=plan, json=folder / "out.json", steps=2)
        return mesh_worker.run(options)


def test_moved_bytes_equal_the_price_on_every_link_of_eight_ranks(eight):
    assert faults([eight]) == []
    for phase in ("prefill", "decode"):
        part = eight["phases"][phase]
        assert all(part["moved"][link] == part["priced_moved"][link] > 0 for link in LINKS)
        assert part["device_bytes"] > 0
        assert 0 < sum(part["rows"].values()) < sum(part["moved"].values())
        assert 0 < part["logits_difference"] < 1e-5 < part["logits_largest"]


def test_tables_fit_a_hundred_columns_and_say_what_is_equal(eight):
    console = Console(width=100, record=True, quiet=False, file=io.StringIO())
    console.print(time_table([eight]), byte_table([eight]))
    lines = console.export_text().splitlines()
    assert max(map(len, map(str.rstrip, lines))) <= 100
    assert sum(" = " in line for line in lines) == 6
    assert not any("…" in line for line in lines)


def test_the_picture_is_drawn(eight, tmp_path):
    plot_meshes([eight], tmp_path / "mesh.png")
    assert (tmp_path / "mesh.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("priced_moved", {"node": 5.0}, "8 ranks, decode: .* moved by node, priced 5"),
        ("rows", {"own": 0}, "bytes of real rows, .* were routed"),
        ("device_bytes", 3, "the executable moves 3"),
        ("logits_difference", 1e-3, r"logits differ by 1\.0e-03"),
    ],
)
def test_any_difference_is_a_fault(eight, field, change, message):
    part = dict(eight["phases"]["decode"])
    part[field] = part[field] | change if isinstance(change, dict) else change
    wrong = eight | {"phases": {"decode": part}}
    with pytest.raises(ValueError, match=message):
        raise ValueError("\n".join(faults([wrong])))


def test_a_worker_that_fails_or_hangs_is_reported(monkeypatch, tmp_path):
    hung = run_worker(Study(limit_s=0.01), 1, None, tmp_path)
    assert hung == {"ranks": 1, "error": "no end after 0.01 s"}
    monkeypatch.setitem(study.MESHES, 8, "300x8")
    failed = run_worker(Study(), 8, None, tmp_path)
    assert "exit code 1" in failed["error"]
    assert "devices must be 1 to 256, got 300" in failed["error"]
    assert len(faults([hung, failed])) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"meshes": (8, 16)}, r"--meshes must be of 1, 8, 64, 384, 768, got \[16\]"),
        ({"meshes": ()}, "--meshes must be of"),
        ({"prompt": 64}, "--prompt must be at most 63 tokens, got 64"),
        ({"repeat": 0}, "--repeat must be positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Study(**options)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [64, 384])
def test_the_command_finds_no_fault(ranks, tmp_path, monkeypatch, capsys):
    out = tmp_path / "mesh.json"
    assert study.main(Study(meshes=(ranks,), json=str(out))) == 0
    (result,) = json.loads(out.read_text())
    assert result["ranks"] == ranks
    assert result["peak_bytes"] < 4 * 2**30
    assert set(result["phases"]) == {"prefill", "decode"}
    assert "decode step" in capsys.readouterr().out
