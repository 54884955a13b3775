"""The manual's pictures are drawn from the tables beside them."""

import csv
from pathlib import Path

import pytest

from studies import arithmetic_figure, pangu_figure, placement_figure, rsq_asr_figure

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = {
    "arithmetic": arithmetic_figure,
    "pangu_constants": pangu_figure,
    "placement": placement_figure,
    "rsq_asr": rsq_asr_figure,
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_from_the_table_beside_it(name, tmp_path, capsys):
    study = PICTURES[name]
    study.main(study.Figure(csv=DOCS / f"{name}.csv", out=tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_finding_is_of_an_arithmetic_that_the_chip_has():
    row = {"name": "bfloat16", "decode_ms": 90.0, "divergence": 1e-5, "agreement": 0.99}
    int8 = row | {"name": "int8", "decode_ms": 60.0, "agreement": 0.985}
    four = row | {"name": "msd_w4a16", "decode_ms": 30.0}
    assert arithmetic_figure.finding([row, int8, four]) == (
        "int8: decodes 1.50 times as fast as bfloat16, agrees on 98.5 % of bytes"
    )


def test_time_against_greedy_is_a_ratio_of_the_times_in_the_table():
    rows = placement_figure.read_rows(DOCS / "placement.csv")
    later, other = placement_figure.lines(rows, 128)
    assert (len(later), len(other)) == (4, 7)
    line = next(line for line in other if line.name == "ESFT law → intent")
    assert line.change["search"] == pytest.approx(100 * (28.80 / 28.86 - 1))
    assert line.change["search, shrunk 0.2"] == pytest.approx(100 * (24.09 / 28.86 - 1))
    assert line.change["ceiling"] == pytest.approx(100 * (1 / 2.525 - 1))


def test_the_finding_counts_cases_that_gain():
    line = placement_figure.Line
    other = [
        line("a", {"search": -1.0, "search, shrunk 0.2": -12.0}),
        line("b", {"search": -8.0, "search, shrunk 0.2": -30.0}),
        line("c", {"search": 2.0, "search, shrunk 0.2": 3.0}),
    ]
    assert "gains 12 to 30 % in 2 of 3 cases, plain search in 1" in placement_figure.finding(other)


def test_ranks_without_rows_are_refused(tmp_path):
    rows = placement_figure.read_rows(DOCS / "placement.csv")
    with pytest.raises(ValueError, match="no rows of 3 ranks"):
        placement_figure.plot(rows, tmp_path / "picture.png", ranks=3)


def test_a_table_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("name,case\na,b\n")
    with pytest.raises(ValueError, match="no column later_ms"):
        placement_figure.read_rows(path)
    with pytest.raises(ValueError, match=r"other\.csv"):
        arithmetic_figure.read_rows(path)
    with pytest.raises(ValueError, match=r"other\.csv"):
        rsq_asr_figure.read_rows(path)


def test_losses_of_the_table_are_differences_of_its_rates():
    with (DOCS / "rsq_asr.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    base = {row["network"]: float(row["wer"]) for row in rows if row["variant"] == "float32"}
    for row in rows:
        loss = float(row["wer"]) - base[row["network"]]
        assert float(row["wer_loss"]) == pytest.approx(loss, abs=0.0101)
        assert float(row["wer_least"]) <= float(row["wer"]) <= float(row["wer_most"])


def test_points_near_one_another_are_named_together():
    pixels = arithmetic_figure.np.array([[0.0, 0.0], [5.0, 0.0], [100.0, 0.0]])
    assert arithmetic_figure._together(pixels) == [[0, 1], [2]]
