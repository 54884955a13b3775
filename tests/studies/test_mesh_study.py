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


def _result(ranks, mesh):
    """As a worker reports; the largest numbers are those of 768 ranks."""
    seconds = {"cpu_s": 17.6543, "wall_s": 149.23}
    tiers = dict(zip(LINKS, (2_310_144, 32_342_016, 1_737_228_288), strict=True))
    rows = dict(zip(("own", *LINKS), (18_432, 21_504, 257_536, 13_860_352), strict=True))
    part = {
        "moved": {"own": 5} | tiers,
        "priced_moved": {link: float(size) for link, size in tiers.items()},
        "rows": rows,
        "priced_rows": {link: rows[link] * 1.25 for link in LINKS},
        "rows_sent": sum(rows.values()),
        "between_devices": 7,
        "device_bytes": 7,
        "logits_difference": 4.3e-6,
    }
    return {
        "ranks": ranks,
        "mesh": mesh,
        **dict.fromkeys(("start", "compile", "prefill", "total"), seconds),
        "steps": {"cpu_s": [0.8, 0.7], "wall_s": [1.9, 2.0]},
        "peak_bytes": 5 * 2**28,
        "phases": {"prefill": part, "decode": part},
    }


EIGHT, MOST = _result(8, "2x2x2"), _result(768, "48x8x2")


@pytest.mark.slow
def test_moved_bytes_equal_the_price_on_every_link_of_eight_ranks(tmp_path, monkeypatch):
    # in this process, and of one kind of layer, which compiles sooner
    config = dataclasses.replace(mesh_worker.small_model(), layers=2, dense_layers=(), heads=16)
    monkeypatch.setattr(mesh_worker, "small_model", lambda: config)
    options = mesh_worker.Worker(
        mesh="2x2x2", plan=write_plan(8, tmp_path), json=tmp_path / "out.json", steps=2
    )
    found = mesh_worker.run(options)
    assert faults([found]) == []
    for part in found["phases"].values():
        assert all(part["moved"][link] == part["priced_moved"][link] > 0 for link in LINKS)
        assert part["device_bytes"] > 0
        assert 0 < sum(part["rows"].values()) < sum(part["moved"].values())
        assert 0 < part["logits_difference"] < 1e-5 < part["logits_largest"]


def test_tables_fit_a_hundred_columns_and_say_what_is_equal():
    console = Console(width=100, record=True, quiet=False, file=io.StringIO())
    console.print(time_table([EIGHT, MOST]), byte_table([EIGHT, MOST]))
    lines = console.export_text().splitlines()
    assert max(map(len, map(str.rstrip, lines))) <= 100
    assert sum(" = " in line for line in lines) == 12
    assert not any("…" in line for line in lines)
    assert faults([EIGHT, MOST]) == []


def test_the_picture_is_drawn(tmp_path):
    plot_meshes([EIGHT, MOST], tmp_path / "mesh.png")
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
def test_any_difference_is_a_fault(field, change, message):
    part = dict(EIGHT["phases"]["decode"])
    part[field] = part[field] | change if isinstance(change, dict) else change
    wrong = EIGHT | {"phases": {"decode": part}}
    with pytest.raises(ValueError, match=message):
        raise ValueError("\n".join(faults([wrong])))


def test_a_worker_that_fails_or_hangs_is_reported(monkeypatch, tmp_path):
    hung = run_worker(Study(limit_s=0.01), 1, None, tmp_path)
    assert hung == {"ranks": 1, "error": "no end after 0.01 s"}
    monkeypatch.setitem(study.MESHES, 8, "300x8")
    failed = run_worker(Study(), 8, None, tmp_path)
    assert "exit code 2: error: devices must be 1 to 256, got 300" in failed["error"]
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
    study.main(Study(meshes=(ranks,), json=str(out)))
    (result,) = json.loads(out.read_text())
    assert result["ranks"] == ranks
    assert result["peak_bytes"] < 4 * 2**30
    assert set(result["phases"]) == {"prefill", "decode"}
    assert "decode step" in capsys.readouterr().out
