"""`cmjax place --evaluate` and `--format`: plans in and out of files, as a user meets them."""

import json

import numpy as np
import pytest

from cmjax.cli import main
from cmjax.placement import read_plan

SMALL = ["--ranks", "4", "--redundant", "4", "--method", "greedy"]


@pytest.fixture
def loads(tmp_path):
    path = tmp_path / "loads.npy"
    np.save(path, np.random.default_rng(0).integers(1, 1000, size=(3, 12)))
    return str(path)


def evaluate(capsys, plan, *arguments):
    assert main(["place", *arguments, "--evaluate", str(plan), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["evaluation"]


@pytest.mark.parametrize("format", ["own", "sglang", "vllm-ascend"])
def test_a_written_plan_is_judged_as_when_it_was_made(format, capsys, loads, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    main(["place", loads, *SMALL, "--json", "-"])
    made = json.loads(capsys.readouterr().out)["evaluation"]["greedy"]
    labels = ["--first-layer", "3"] if format == "sglang" else []
    assert main(["place", loads, *SMALL, *labels, "--format", format, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    ranks = [*labels, "--ranks", "4"] if format == "sglang" else []
    found = evaluate(capsys, path, loads, *ranks)
    assert set(found) == {"plan", "greedy", "contiguous"}
    assert found["greedy"] == pytest.approx({name: made[name] for name in found["greedy"]})
    if format == "vllm-ascend":  # greedy has an expert twice on a rank, which must be undone
        assert "one copy of an expert per rank: 2 slots changed" in said
        assert f"-> {found['plan']['mean_par']:.4f}" in said
    else:
        assert found["plan"] == pytest.approx(found["greedy"])


def test_our_own_file_says_how_the_plan_came_about(capsys, loads, tmp_path):
    path = tmp_path / "plan.json"
    assert main(["place", loads, *SMALL, "--first-layer", "5", "--json", str(path)]) == 0
    plan = read_plan(path)
    assert plan.layer_labels == (5, 6, 7)
    assert plan.provenance["method"] == "greedy" and plan.provenance["loads"] == loads
    assert "evaluation" in json.loads(path.read_text())


def test_several_workloads_are_judged_one_by_one(capsys, loads, tmp_path):
    plan = tmp_path / "plan.json"
    assert main(["place", loads, *SMALL, "--json", str(plan)]) == 0
    capsys.readouterr()
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "family.npz", law=rng.random((3, 12)), art=rng.random((3, 12)))
    found = evaluate(capsys, plan, str(tmp_path / "family.npz"), "--domain", "*")
    assert {"plan on law", "plan on art", "greedy on law"} <= set(found)
    assert found["plan on law"]["time_ms"] >= found["greedy on law"]["time_ms"]


def test_public_plans_of_uneven_depth_are_judged(data, capsys, tmp_path):
    counts = tmp_path / "counts.npy"
    np.save(counts, np.random.default_rng(0).random((58, 256)) + 0.5)
    path = f"{data}/moe_deepseek_v3_placements/placements.npz:1k_decode_red10_dies32"
    found = evaluate(capsys, path, str(counts))
    assert list(found) == ["plan"]  # of no one size that greedy could be given
    assert found["plan"]["gap_to_bound"] > 0 and 0 < found["plan"]["balancedness"] < 1


def test_the_page_shows_made_and_judged_plans(capsys, loads, tmp_path):
    plan, page = tmp_path / "plan.json", tmp_path / "page.html"
    made = ["place", loads, *SMALL, "--json", str(plan), "--html", str(page)]
    assert main(made) == 0
    assert "Where 12 experts live on 4 dies" in page.read_text()
    judged = ["place", loads, "--evaluate", str(plan), "--html", str(page)]
    assert main([*judged, "--plot", str(tmp_path / "heat.png")]) == 0
    assert "<td>plan</td>" in page.read_text() and (tmp_path / "heat.png").exists()


def test_bad_plans_are_one_line_and_exit_code_2(capsys, loads, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "out.json"
    out.write_text("old")
    good = {"format": "cmjax-placement", "version": 1, "experts": 12, "ranks": 2, "nodes": 1}
    for text, expected in {
        "": "expected a plan as JSON",
        "{": "expected a plan as JSON",
        '{"a": 1}': "unknown plan format",
        json.dumps(good | {"expert_of_slot": [[0] * 12] * 3}): "expert 1 of layer 0 has no slot",
        json.dumps(good | {"expert_of_slot": [[*range(12)]] * 2}): "layers disagree",
        json.dumps(good | {"experts": 2, "expert_of_slot": [[0, 1]] * 3}): "places 2 experts",
        '{"physical_to_logical_map": [[0, 1]]}': "does not say the ranks",
    }.items():
        path.write_text(text)
        assert main(["place", loads, "--evaluate", str(path), "--json", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
        assert str(path) in error and out.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "greedy"], "--ranks is needed"),
        ([*SMALL, "--format", "sglang"], "give --first-layer"),
        ([*SMALL, "--domain", "law"], "found no domain 'law'"),
        ([*SMALL, "--html", "page.pdf"], "page.pdf: pages are written as .html, got .pdf"),
        (["--evaluate", "none.json"], "none.json: expected a plan, found no such file"),
        (["--evaluate", "none.json", "--tokens", "0"], "tokens must be at least 1"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments, expected, capsys, loads):
    assert main(["place", loads, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error
