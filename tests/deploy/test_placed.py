"""The face: experts placed and plans judged from Python, as the command does."""

import dataclasses
import inspect
import json

import numpy as np
import pytest

from cmjax.cli import main
from cmjax.deploy.layer_price import LayerPrice
from cmjax.deploy.place_options import Judging, Recording, Search, Target
from cmjax.deploy.placed import evaluate, place
from cmjax.hardware import load_machine
from cmjax.placement import BASELINES, Loads, Plan, read_plan

COUNTS = np.random.default_rng(0).integers(1, 1000, size=(2, 3, 16))
MACHINE = load_machine("cloudmatrix384")
SMALL = {"ranks": 4, "redundant": 4, "method": "greedy"}


@pytest.fixture(scope="module")
def placed():
    return place(COUNTS, MACHINE, **SMALL)


def test_arrays_loads_and_files_are_placed_alike(placed, tmp_path):
    np.save(tmp_path / "loads.npy", COUNTS)
    for loads in (Loads(COUNTS), tmp_path / "loads.npy", str(tmp_path / "loads.npy")):
        found = place(loads, "cloudmatrix384", **SMALL)
        assert (found.plan.expert_of_slot == placed.plan.expert_of_slot).all()
        assert found.score.mean_time_s == placed.score.mean_time_s


def test_the_command_prints_what_the_face_returns(placed, capsys, tmp_path):
    np.save(tmp_path / "loads.npy", COUNTS)
    command = ["place", str(tmp_path / "loads.npy"), "--ranks", "4", "--redundant", "4"]
    assert main([*command, "--method", "greedy", "--json", "-"]) == 0
    printed, said = json.loads(capsys.readouterr().out), placed.to_dict()
    assert list(printed) == list(said)
    assert printed["expert_of_slot"] == said["expert_of_slot"]
    for name, scores in printed["evaluation"].items():
        assert scores.pop("solve_s") >= 0 < said["evaluation"][name]["time_ms"]
        assert scores == {k: v for k, v in said["evaluation"][name].items() if k != "solve_s"}


def test_a_placement_holds_every_rule_and_the_price_that_judged_them(placed):
    assert set(placed.plans) == set(placed.scores) == {*BASELINES, "greedy"}
    assert placed.plan is placed.plans["greedy"] and placed.score is placed.scores["greedy"]
    assert isinstance(placed.price, LayerPrice)
    np.testing.assert_allclose(placed.loads.counts.sum(-1), placed.price.assignments)
    tokens = placed.plan.tokens_per_rank(placed.loads.counts)  # [windows, layers, ranks]
    seconds = np.asarray(placed.price(tokens)).sum(-1).mean()
    assert placed.score.mean_time_s == pytest.approx(seconds, rel=1e-6)
    assert set(placed.tokens) == {"contiguous", "greedy"}
    np.testing.assert_array_equal(placed.tokens["greedy"], tokens[-1])


def test_a_placement_is_read_in_a_terminal_and_in_a_notebook(placed):
    text, page = repr(placed), placed._repr_html_()
    assert all(name in text and name in page for name in BASELINES)
    marked = [line for line in text.splitlines() if "◀" in line]
    assert len(marked) == 1 and marked[0].split()[0] == "greedy"
    assert f"{placed.score.cost_s * 1e3:.4g}" in marked[0]
    assert max(map(len, text.splitlines())) <= 100
    assert page.count("<tr>") == 1 + len(BASELINES) and "16 experts on 4 ranks" in page


@pytest.mark.parametrize("format", ["own", "vllm-ascend"])
def test_a_saved_plan_is_judged_as_the_one_in_hand(placed, format, tmp_path):
    path = tmp_path / "plan.json"
    placed.save(path, format)
    plan = placed.fit(format)
    assert (read_plan(path).expert_of_slot == plan.expert_of_slot).all()
    found = evaluate(path, COUNTS, MACHINE)
    assert found.score.to_dict() == pytest.approx(evaluate(plan, COUNTS, MACHINE).score.to_dict())
    assert found.scores["greedy"].mean_time_s == pytest.approx(placed.score.mean_time_s)
    if format == "own":
        assert found.score.mean_par == pytest.approx(placed.score.mean_par)
        assert read_plan(path).provenance["loads"] == "loads"


def test_what_a_format_cannot_hold_is_refused_before_the_search():
    def progress(done, total, note):
        raise AssertionError("searched")

    with pytest.raises(ValueError, match="give --first-layer"):
        place(COUNTS, MACHINE, ranks=4, format="sglang", progress=progress)
    with pytest.raises(ValueError, match="holds neither empty slots nor shares"):
        place(COUNTS, MACHINE, ranks=4, format="vllm-ascend", weighted=True, progress=progress)


def test_a_plan_in_hand_is_improved_and_tested_on_loads_in_hand(placed):
    later = COUNTS[:1, ::-1]
    found = place(
        COUNTS, MACHINE, ranks=4, redundant=4,
        start_from=placed.plans["contiguous"], moves=4, seconds=0.0, test=later, family=(later,),
        without_ranks=(), step_tokens=0,
    )  # fmt: skip
    assert found.method == "search" and set(found.plans) == {*BASELINES, "running", "search"}
    assert found.score.objective_s < found.scores["running"].objective_s
    assert found.score.test.par.shape == (1, 3) and found.score.step_par is None
    assert len(found.loads.counts) == 3  # two windows and the family's one


def test_dead_ranks_are_named_by_numbers_or_text():
    some = {"ranks": 4, "redundant": 16, "method": "greedy"}
    by_text, by_number = (
        place(COUNTS, MACHINE, without_ranks=ranks, **some) for ranks in ("3,1", (1, 3))
    )
    np.testing.assert_array_equal(by_text.plan.expert_of_slot, by_number.plan.expert_of_slot)
    assert by_text.plan.alive.tolist() == [True, False, True, False]


def test_progress_is_told_how_far_the_search_is():
    told = []
    place(COUNTS, MACHINE, ranks=4, seconds=0.0, progress=lambda *step: told.append(step))
    done, total, note = told[-1]
    assert done == total > 0 and note.endswith(" ms")


@pytest.mark.parametrize(
    ("budget", "allowed"), [("50MB", 1), ("0.1 GB", 2), (5e7, 1), ("5e7", 1), ("86 MiB", 2)]
)
def test_a_budget_is_text_with_a_unit_or_a_number_of_bytes(budget, allowed):
    assert Search(start_from="x", migration_budget=budget).moves_allowed(45e6) == allowed


@pytest.mark.parametrize("budget", ["2 parsecs", "much", "-1 GB", "", -5.0])
def test_a_budget_that_is_no_bytes_is_refused(budget):
    with pytest.raises(ValueError, match="expected bytes such as 2GB or 512MiB, got"):
        Search(start_from="x", migration_budget=budget).moves_allowed(45e6)


def test_every_option_of_the_groups_is_one_of_the_face_with_its_default():
    given = inspect.signature(place).parameters
    for group in (Recording, Target, Search, Judging):
        for field in dataclasses.fields(group):
            assert field.name == "ranks" or given[field.name].default == field.default


def test_a_plan_for_other_loads_is_refused():
    with pytest.raises(ValueError, match="the plan places 2 experts per layer, loads counts 16"):
        evaluate(Plan([[0, 1]] * 3, 2, 2), COUNTS, MACHINE)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        evaluate(Plan([[0, 1]] * 3, 2, 2), COUNTS, MACHINE, tokens=0)


def test_a_rank_that_costs_more_gets_less():
    cost = [1.0, 1.0, 1.0, 2.0]
    options = {"ranks": 4, "redundant": 4, "rank_cost": cost}
    placed = place(COUNTS, MACHINE, **options, seconds=4)
    tokens = (placed.plan.tokens_per_rank(placed.loads.counts) / cost).mean((0, 1))
    assert tokens[3] < 0.8 * tokens[:3].min()
    assert placed.scores["search"].mean_time_s < placed.scores["greedy"].mean_time_s
    judged = evaluate(placed.plan, COUNTS, MACHINE, rank_cost=cost).scores["plan"]
    assert judged.mean_time_s == pytest.approx(placed.score.mean_time_s)


def test_where_a_rank_costs_more_multicast_sends_as_many_rows():
    even, dear = (
        place(COUNTS, MACHINE, **SMALL, multicast=True, rank_cost=cost).score.mean_time_s
        for cost in ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0])
    )
    assert even == pytest.approx(place(COUNTS, MACHINE, **SMALL, multicast=True).score.mean_time_s)
    assert dear > even
