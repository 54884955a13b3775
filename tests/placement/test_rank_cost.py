"""Ranks on which a token costs more get fewer of them."""

import itertools
import json
import re

import numpy as np
import pytest

from cmjax.placement import (
    Loads,
    Plan,
    Problem,
    evaluate,
    example_loads,
    greedy,
    lower_bound_tokens,
    rank_cost,
    search,
)
from cmjax.placement.methods.search import SHORT

MATRIX = [[1.0, 3.0], [2.0, 1.0]]


def busiest(tokens):
    return tokens.max(-1)


def price(tokens):
    return 1e-6 * tokens.max(-1)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("row.csv", "1,1.5\n", (1.0, 1.5)),
        ("column.csv", "1\n1.5\n", (1.0, 1.5)),
        ("matrix.csv", "1,3\n2,1\n", (1.5, 2.0)),
        ("row.json", "[1, 1.5]", (1.0, 1.5)),
        ("matrix.json", json.dumps(MATRIX), (1.5, 2.0)),
    ],
)
def test_a_number_a_rank_or_a_matrix_is_read(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert rank_cost(tmp_path / name, 2) == expected


def test_an_array_is_read_from_a_file_and_from_python(tmp_path):
    np.save(tmp_path / "cost.npy", np.array(MATRIX))
    assert rank_cost(tmp_path / "cost.npy", 2) == rank_cost(MATRIX, 2) == (1.5, 2.0)


@pytest.mark.parametrize(
    "given, routing, message",
    [
        ([1.0, 2.0, 3.0], "even", "rank_cost: expected 2 numbers, one a rank, or a matrix [2, 2]"),
        ([1.0, 0.0], "even", "rank_cost: expected positive finite numbers, got 0 at (1,)"),
        ([1.0, np.nan], "even", "rank_cost: expected positive finite numbers, got nan at (1,)"),
        (["a", "b"], "even", "rank_cost: expected numbers, got ['a', 'b']"),
        ("cost.txt", "even", "rank_cost cost.txt: expected a .csv, .json or .npy file"),
        (MATRIX, "nearest-copy", "rank_cost: a matrix goes with routing even; for nearest-copy"),
    ],
)
def test_what_is_no_cost_is_refused(given, routing, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        rank_cost(given, 2, routing=routing)


def test_tokens_of_a_plan_are_ordinary_ones():
    plan = Plan([[0, 1]], experts=2, ranks=2, rank_cost=(1.0, 1.5))
    assert plan.tokens_per_rank([[60, 40]]).tolist() == [[60.0, 60.0]]


def test_search_finds_the_plan_that_counting_all_of_them_finds():
    counts = np.array([[50.0, 40.0, 30.0, 20.0, 20.0, 10.0]])
    problem = Problem(Loads(counts), ranks=2, rank_cost=(1.0, 2.0))
    best = min(
        busiest(problem.plan([list(order)]).tokens_per_rank(counts)).item()
        for order in itertools.permutations(range(6))
    )
    found = search(problem, price, config=SHORT)
    assert busiest(found.tokens_per_rank(counts)).item() == best == 120.0


@pytest.mark.parametrize("routing", ["even", "nearest-copy", "rank-modulo"])
def test_a_search_that_knows_the_cost_beats_one_that_does_not(routing):
    loads = example_loads(layers=2, experts=32)
    cost = tuple(np.where(np.arange(8) % 4 == 3, 1.6, 1.0).tolist())
    common = {"ranks": 8, "redundant": 8, "nodes": 2, "routing": routing}
    knows = Problem(loads, rank_cost=cost, **common)
    aware, blind = (search(p, price, config=SHORT) for p in (knows, Problem(loads, **common)))
    aware_s = evaluate(aware, loads, price).mean_time_s
    blind_s = evaluate(knows.plan(blind.expert_of_slot), loads, price).mean_time_s
    assert aware_s < 0.9 * blind_s
    bound = lower_bound_tokens(knows)
    assert (busiest(aware.tokens_per_rank(loads.counts)) >= bound * (1 - 1e-9)).all()
    if routing == "even":  # the level at which all ranks are equally busy is nearly reached
        assert (busiest(aware.tokens_per_rank(loads.counts)) < 1.2 * bound).all()


def test_the_bound_is_the_level_at_which_all_ranks_are_equally_busy():
    problem = Problem(Loads([[10.0, 10, 10, 10]]), ranks=2, rank_cost=(1.0, 3.0))
    assert lower_bound_tokens(problem).tolist() == [[30.0]]  # 30 tokens there, 10 here


def test_dead_ranks_take_their_cost_with_them():
    problem = Problem(
        Loads([[10.0, 10, 10, 10]]), ranks=3, redundant=2,
        without_ranks=(1,), rank_cost=(1.0, 5.0, 2.0),
    )  # fmt: skip
    ((_, part),) = problem.dense()
    assert part.rank_cost == (1.0, 2.0)
    whole = problem.assemble([greedy(part)])
    assert whole.rank_cost == (1.0, 5.0, 2.0)
