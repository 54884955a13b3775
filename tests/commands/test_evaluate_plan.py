"""`cmjax place --evaluate` and `--format`: plans in and out of files, as a user meets them."""

import json

import numpy as np
import pytest

from cmjax.cli import main
from cmjax.placement import Plan, read_plan, routing_of, write_plan

SMALL = ["--ranks", "4", "--redundant", "4", "--method", "greedy"]


@pytest.fixture
def loads(tmp_path):
    path = tmp_path / "loads.npy"
    np.save(path, np.random.default_rng(0).integers(1, 1000, size=(3, 12)))
    return str(path)


def evaluate(capsys, plan, *arguments):
    assert main(["place", *arguments, "--evaluate", str(plan), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["evaluation"]


NUMBERED = {"sglang", "tensorrt-llm"}
SILENT = {"sglang", "tensorrt-llm", "vllm"}  # as to the ranks


@pytest.mark.parametrize("format", ["own", "sglang", "vllm-ascend", "vllm", "tensorrt-llm"])
def test_a_written_plan_is_judged_as_when_it_was_made(format, capsys, loads, tmp_path):
    path = tmp_path / ("plan.yaml" if format == "tensorrt-llm" else "plan.json")
    path.write_text("old")
    routing = routing_of(format)
    main(["place", loads, *SMALL, "--routing", routing, "--json", "-"])
    made = json.loads(capsys.readouterr().out)["evaluation"]["greedy"]
    main(["place", loads, *SMALL, "--json", "-"])
    made_even = json.loads(capsys.readouterr().out)["evaluation"]["greedy"]
    labels = ["--first-layer", "3"] if format in NUMBERED else []
    assert main(["place", loads, *SMALL, *labels, "--format", format, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    ranks = [*labels, "--ranks", "4"] if format in SILENT else []
    found = evaluate(capsys, path, loads, *ranks)
    both = routing != "even"
    beside = {"plan, split evenly"} if both else set()
    assert set(found) == {"plan", "greedy", "contiguous"} | beside
    assert found["greedy"] == pytest.approx({name: made[name] for name in found["greedy"]})
    assert found["plan"] == pytest.approx(found["greedy"])
    if both:
        split = found["plan, split evenly"]
        assert split == pytest.approx({name: made_even[name] for name in split})
    assert ("needs:" in said) == (format != "own")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["sglang", "vllm-ascend"])
def test_a_plan_is_made_and_judged_as_its_engine_routes(format, capsys, tmp_path):
    loads, path = tmp_path / "loads.json", tmp_path / "plan.json"
    loads.write_text("[[300, 100, 100, 100, 100, 100, 100, 100]]")
    shape = ["--ranks", "4", "--nodes", "2"]
    made = [*shape, "--redundant", "4", "--first-layer", "0", "--format", format]
    assert main(["place", str(loads), *made, "--json", str(path)]) == 0
    capsys.readouterr()
    assert evaluate(capsys, path, str(loads), *shape)["plan"]["mean_par"] == pytest.approx(1.0)
    old = Plan([[0, 6, 2, 0, 7, 2, 0, 3, 1, 1, 4, 5]], 8, 4, 2, (0,))
    write_plan(path, old, format)
    found = evaluate(capsys, path, str(loads), *shape)
    assert found["plan, split evenly"]["mean_par"] == pytest.approx(1.0)
    assert found["plan"]["mean_par"] == pytest.approx(1.2)


@pytest.mark.slow
def test_copies_stay_within_the_ranks_of_engines_that_want_one_a_rank(capsys, tmp_path):
    loads, path = tmp_path / "loads.json", tmp_path / "plan.json"
    hot = [600, 100, 60, 60, 60, 40, 40, 40]
    loads.write_text(json.dumps([hot, hot[::-1]]))
    shape = ["--ranks", "4", "--redundant", "8", "--format", "vllm-ascend"]
    assert main(["place", str(loads), *shape, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    plan = read_plan(path)
    assert plan.doubles == 0 and plan.copies.max() == 4
    assert evaluate(capsys, path, str(loads))["plan"]["mean_par"] < 1.0134
    assert '"num_redundant_experts": 8' in said


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
        "": "not valid JSON",
        "{": "not valid JSON",
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
