"""Choosing algorithms by gradient: against the exact optimum, and what the study prices."""

import itertools

import numpy as np
import pytest

from cmjax.hardware import load_machine
from studies.asr_price import Candidates, Options, choices, choose, network_times, table

BASE_DB = 38.0


def _layers(seed: int, count: int) -> list[Candidates]:
    random = np.random.default_rng(seed)
    return [
        Candidates(
            ("direct", *(f"a{i}" for i in range(4))),
            np.array([1.0, *random.uniform(0.35, 0.95, 4)]) * random.uniform(0.5, 2),
            np.array([1.0, *random.uniform(1.5, 30.0, 4)]),
        )
        for _ in range(count)
    ]


def _best(layers: list[Candidates], sqnr_db: float) -> float:
    budget = len(layers) * 10 ** ((BASE_DB - sqnr_db) / 10)
    times = [
        sum(layer.time_s[i] for layer, i in zip(layers, picks, strict=True))
        for picks in itertools.product(range(5), repeat=len(layers))
        if sum(layer.noise[i] for layer, i in zip(layers, picks, strict=True)) <= budget
    ]
    return min(times)


@pytest.mark.parametrize("sqnr_db", [26.0, 30.0, 34.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_choice_keeps_the_noise_budget_and_comes_close_to_the_optimum(seed, sqnr_db):
    layers = _layers(seed, 5)
    picks = choose(layers, sqnr_db)
    noise = sum(layer.noise[i] for layer, i in zip(layers, picks, strict=True))
    assert noise <= len(layers) * 10 ** ((BASE_DB - sqnr_db) / 10)
    time_s = sum(layer.time_s[i] for layer, i in zip(layers, picks, strict=True))
    # descent, rounding and repair are no exact search: a tenth is what is asked of them
    assert _best(layers, sqnr_db) <= time_s <= 1.1 * _best(layers, sqnr_db)


def test_without_room_for_noise_every_layer_stays_direct():
    assert choose(_layers(3, 4), BASE_DB) == [0] * 4


def test_layers_with_fewer_candidates_never_take_one_they_lack():
    one = Candidates(("direct",), np.array([1.0]), np.array([1.0]))
    picks = choose([one, *_layers(4, 2)], 20.0)
    assert picks[0] == 0


def test_winograd_has_more_vector_and_less_cube_work_in_the_priced_network():
    machine = load_machine("cloudmatrix384")
    found = network_times("dfsmn", machine, 8, 600)
    direct, short = found["int8"][1], found["int8-winograd"][1]
    assert short["cube"] < direct["cube"] and short["vector"] > direct["vector"]


def test_bad_options_are_refused_by_name():
    with pytest.raises(ValueError, match="--batches and --frames must be at least 1"):
        Options(batches=(0,))
    with pytest.raises(ValueError, match=r"--sqnr-db must lie in \(0, 38\]"):
        Options(sqnr_db=50.0)


def test_the_table_gives_gains_and_the_lines_count_what_was_chosen():
    row = {
        "network": "dfsmn",
        "batch": 1,
        "frames": 300,
        "seconds": {"float32": 3e-3, "int8": 2e-3, "int8-winograd": 1e-3},
        "engines_busy": {"cube": 0.5, "vector": 0.1},
        "backbone_direct_s": 2.0,
        "backbone_chosen_s": 1.0,
        "layers": ["3 taps", "3 taps"],
        "chosen": ["F(4,3)", "F(4,3)"],
    }
    made = table([row], "cloudmatrix384")
    cells = [next(iter(column.cells)) for column in made.columns]
    assert cells[0] == "dfsmn 1 x 300" and cells.count("2.00x") == 2
    assert choices([row]) == ["dfsmn 1 x 300: 2 of F(4,3) (3 taps)"]
