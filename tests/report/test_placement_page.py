"""The page of a placement: its table and all its pictures, in one file."""

import dataclasses
import re

import numpy as np
import pytest

from cmjax.deploy.placed import place
from cmjax.placement import Loads, Problem, Routes, contiguous, evaluate, greedy, reach
from cmjax.report import PlacementPage


def slowest(tokens):
    return 1e-4 + 1e-7 * tokens.max(-1)


@pytest.fixture
def page():
    rng = np.random.default_rng(0)
    routes = Routes(rng.random((300, 3, 16)).argsort(-1)[..., :2], 16)
    problem = Problem(routes.loads(), 8, 8, 2)
    plans = {"contiguous": contiguous(problem), "greedy": greedy(problem)}
    counts = problem.loads.counts
    return PlacementPage(
        title="Where experts live",
        setting="Loads: random <routes>.",
        loads=counts[-1],
        tokens={name: plan.tokens_per_rank(counts[-1]) for name, plan in plans.items()},
        scores={name: evaluate(plan, Loads(counts), slowest) for name, plan in plans.items()},
        nodes=2,
        row_bytes=300.0,
        reach={name: reach(plan, routes) for name, plan in plans.items()},
    )


def test_the_page_holds_the_table_and_every_picture(page, tmp_path):
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/svg+xml") == 4
    assert re.search(r"<h2>(greedy|contiguous) is fastest</h2>", text)
    assert f"{page.scores['greedy'].mean_par:.3f}" in text and "random &lt;routes&gt;" in text
    assert "Between nodes" in text and f"{page.reach['greedy'].ranks.mean():.2f}" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_plans_judged_elsewhere_have_a_table_of_that(page, tmp_path):
    path = tmp_path / "page.html"
    page.write(path)
    assert "elsewhere" not in path.read_text()
    tested = dataclasses.replace(page.scores["greedy"], test=page.scores["contiguous"])
    dataclasses.replace(page, scores=page.scores | {"greedy": tested}).write(path)
    text = path.read_text()
    assert "<h2>greedy elsewhere</h2>" in text
    assert text.count(f"{page.scores['contiguous'].mean_par:.3f}") >= 2


def test_plans_are_ranked_by_the_objective_they_were_made_for(page, tmp_path):
    path = tmp_path / "page.html"
    fastest = min(page.scores, key=lambda name: page.scores[name].mean_time_s)
    other = "greedy" if fastest == "contiguous" else "contiguous"
    objective_s = {fastest: 0.0431, other: 0.0219}
    scores = {
        name: dataclasses.replace(score, objective_s=objective_s[name], objective_bound_s=0.02)
        for name, score in page.scores.items()
    }
    dataclasses.replace(page, scores=scores).write(path)
    text = path.read_text()
    assert f"<h2>{other} is fastest</h2>" in text and "43.1" in text and "21.9" in text


def test_what_is_unknown_is_left_out(page, tmp_path):
    path = tmp_path / "page.html"
    dataclasses.replace(page, nodes=1, reach=None).write(path)
    text = path.read_text()
    assert text.count("data:image/svg+xml") == 3
    assert "Between nodes" not in text and "Where a token goes" not in text


def test_a_page_that_cannot_be_written_is_refused(page, tmp_path):
    with pytest.raises(ValueError, match=r"written as \.html"):
        page.write(tmp_path / "page.pdf")


def test_the_page_of_a_placement_says_where_its_bytes_are_from(tmp_path):
    counts = np.random.default_rng(0).integers(1, 1000, size=(2, 3, 64))
    placed = place(counts, "cloudmatrix384", ranks=32, nodes=2, method="greedy")
    page = PlacementPage.of(placed)
    # 7,168 values: 7,680 bytes dispatched as INT8 with their scale, 14,336 combined.
    assert (page.nodes, page.row_bytes) == (2, 22_016)
    assert page.tokens.keys() == placed.tokens.keys() and page.scores is placed.scores
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Where 64 experts live on 32 dies" in text and "22,016 bytes a row" in text
