"""The face: what an engine, a shape or a recording asks for is heeded, and said."""

import json

import numpy as np
import pytest
import yaml

from cmjax.cli import main
from cmjax.deploy.placed import evaluate, place
from cmjax.placement import Loads, read_plan

COUNTS = np.random.default_rng(0).integers(1, 1000, size=(2, 3, 16))
ON = "cloudmatrix384"
RULE = {"method": "greedy"}


def test_the_fewest_redundant_slots_that_divide_are_the_default():
    assert place(COUNTS, ON, ranks=6, **RULE).plan.slots == 18
    assert place(COUNTS, ON, ranks=4, **RULE).plan.slots == 16
    with pytest.raises(ValueError, match="nearest redundant that does is 2"):
        place(COUNTS, ON, ranks=6, redundant=0, **RULE)


def test_uneven_ranks_hold_what_there_is():
    plan = place(COUNTS, ON, ranks=6, uneven=True, **RULE).plan
    assert set(plan.filled.ravel()) == {2, 3} and (plan.copies == 1).all()
    with pytest.raises(ValueError, match="holds neither empty slots nor shares"):
        place(COUNTS, ON, ranks=6, uneven=True, format="vllm", **RULE)


def test_more_copies_than_are_of_use_are_refused_with_the_most_that_are():
    with pytest.raises(ValueError, match="redundant of at most 48 is"):
        place(COUNTS, ON, ranks=4, redundant=52, **RULE)


@pytest.mark.parametrize("judge", [False, True])
def test_ranks_that_are_no_multiple_of_nodes_are_said_so(judge, capsys, tmp_path):
    np.save(tmp_path / "loads.npy", COUNTS)
    plan = place(COUNTS, ON, ranks=4, **RULE)
    plan.save(tmp_path / "plan.json")
    command = ["place", str(tmp_path / "loads.npy"), "--ranks", "15", "--nodes", "2"]
    assert main([*command, *(["--evaluate", str(tmp_path / "plan.json")] if judge else [])]) == 2
    assert "ranks must be a multiple of nodes: 15 ranks" in capsys.readouterr().err


def test_rows_for_all_layers_of_the_model_and_of_its_draft_module(tmp_path):
    loads = Loads(np.ones((2, 256)) + np.arange(256), "record", (3, 10))
    placed = place(loads, ON, ranks=32, redundant=32, format="tensorrt-llm", **RULE)
    found = yaml.safe_load(placed.text("tensorrt-llm"))
    assert list(found["initial_global_assignments"]) == [3, 10, 61]  # 61: DeepSeek-R1's draft layer
    rows = json.loads(placed.text("sglang"))["physical_to_logical_map"]
    assert len(rows) == 61
    assert rows[4] == [slot % 256 for slot in range(288)]
    assert any("59 of them as without a plan" in line for line in placed.told("sglang", "p.json"))
    assert "--ep-num-redundant-experts 32" in placed.told("sglang", "p.json")[0]
    assert len(json.loads(place(
        loads, ON, ranks=32, redundant=32, format="sglang", model_layers=48, **RULE
    ).text("sglang"))["physical_to_logical_map"]) == 48  # fmt: skip


def test_files_that_count_moe_layers_are_refused_for_layers_with_gaps():
    gaps = Loads(COUNTS[0, :2], "record", (3, 10))
    with pytest.raises(ValueError, match="layer 4 is not recorded"):
        place(gaps, ON, ranks=4, format="vllm-ascend", **RULE)


def test_uneven_shares_are_no_engines():
    with pytest.raises(ValueError, match="it goes with --routing even"):
        place(COUNTS, ON, ranks=4, weighted=True, routing="rank-modulo", **RULE)


def test_our_own_file_keeps_the_routing(tmp_path):
    placed = place(COUNTS, ON, ranks=4, redundant=4, routing="rank-modulo", **RULE)
    placed.save(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json").routing == "rank-modulo"
    found = evaluate(tmp_path / "plan.json", COUNTS, ON)
    assert found.score.mean_par == pytest.approx(placed.score.mean_par)
    even = evaluate(tmp_path / "plan.json", COUNTS, ON, routing="even")
    assert even.score.mean_par == pytest.approx(found.scores["plan, split evenly"].mean_par)


def test_a_family_is_planned_for_its_worst_workload_and_named(capsys, tmp_path):
    path = tmp_path / "family.json"
    both = {"law/en": COUNTS[0].tolist(), "art": COUNTS[1].tolist()}
    path.write_text(json.dumps({"counts": both}))
    found = place(path, ON, ranks=4, redundant=4, domain="*", objective="worst", **RULE)
    assert found.loads.window_names == ("law/en", "art") and found.unknown == ""
    slowest = int(found.score.time_s.argmax())
    assert found.score.slowest_name == ("law/en", "art")[slowest]
    assert found.score.slowest_par == pytest.approx(found.score.par[slowest].mean())
    assert found.score.objective_s == found.score.time_s.max()
    command = ["place", str(path), "--domain", "*", "--ranks", "4", "--method", "greedy"]
    assert main([*command, "--objective", "worst", "--test", f"{path}:law/en"]) == 0
    said = capsys.readouterr().out
    assert "law/en" in said and "On loads they were not planned for" in said


def test_an_existing_plan_is_judged_by_the_objective():
    plan = place(COUNTS, ON, ranks=4, redundant=4, **RULE).plan
    found = evaluate(plan, COUNTS, ON, objective="worst")
    for score in found.scores.values():
        assert score.objective_s == pytest.approx(score.time_s.max())
    assert set(found.scores) == {"plan", "greedy", "contiguous"}


def test_one_recording_says_what_it_cannot_know():
    one = place(COUNTS[:1], ON, ranks=4, redundant=4, seconds=0.0)
    assert one.unknown.startswith("one window: how far other texts differ is not known")
    assert "that search gains over greedy here may not be there" in one.unknown
    two = place(COUNTS, ON, ranks=4, redundant=4, **RULE)
    assert two.unknown.startswith("2 windows of one recording")
