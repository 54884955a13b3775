"""The computed tables of the manual are what a fresh run says, within rounding."""

from pathlib import Path

import pytest
from rich.console import Console

from cmjax.cost.measured import read_measurements
from cmjax.deploy.validation import ValidationRow, validate
from studies import pangu, recomputation
from studies.manual_tables import TABLES, Tables, main, markdown, short, validation_cells

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/tables"
CHEAP = ("machines", "counted")


def cells(table: str) -> list[list[str]]:
    """Rows of a Markdown table, without its rule."""
    rows = [line.strip("| ").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


def number(cell: str) -> float | None:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def assert_same(written: list[list[str]], fresh: list[list[str]]) -> None:
    """Equal words; numbers within half a percent, or two units of a percentage's last place."""
    assert [row[:2] for row in written] == [row[:2] for row in fresh]
    for row, again in zip(written, fresh, strict=True):
        for cell, now in zip(row, again, strict=True):
            if (value := number(cell)) is None:
                assert cell == now, row
            else:
                assert number(now) == pytest.approx(value, rel=5e-3, abs=0.21), row


@pytest.mark.parametrize("name", CHEAP)
def test_a_table_holds_what_a_fresh_run_says(name):
    assert_same(cells((FOLDER / f"{name}.md").read_text()), cells(TABLES[name]()))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TABLES) - set(CHEAP)))
def test_a_table_of_predictions_holds_what_a_fresh_run_says(name):
    assert_same(cells((FOLDER / f"{name}.md").read_text()), cells(TABLES[name]()))


def test_the_first_kernels_of_the_table_are_as_validated_now():
    rows = validate(read_measurements("cloudmatrix384")[:2], "cloudmatrix384")
    fresh = [[*validation_cells("cloudmatrix384", row), "yes"] for row in rows]
    assert_same(cells((FOLDER / "kernels.md").read_text())[1:3], fresh)


def test_the_readme_shows_the_whole_steps_of_the_table():
    assert (FOLDER / "end_to_end.md").read_text() in (ROOT / "README.md").read_text()


def test_nothing_else_lies_beside_the_tables():
    assert {path.stem for path in FOLDER.iterdir()} == {
        *TABLES,
        *pangu.TABLES,
        *recomputation.TABLES,
    }


def test_a_row_becomes_one_number_a_cell():
    row = ValidationRow("dispatch EP8", "calibrate", 121.04, 116.0, "somewhere", "us")
    assert validation_cells("m", row) == ("m", "dispatch EP8", "µs", "116", "121", "+4.3")


def test_columns_of_numbers_are_set_to_the_right():
    rows = [("a", "1,024"), ("b", "-0.5")]
    assert markdown(("name", "n"), rows).splitlines()[1] == "| --- | ---: |"


@pytest.mark.parametrize("value, shown", [(6739.6, "6,740"), (584.2, "584"), (0.7741, "0.774")])
def test_numbers_are_shown_to_what_a_reader_needs(value, shown):
    assert short(value) == shown


def test_every_table_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.manual_tables.TABLES", {"one": lambda: "| a |\n"})
    main(Tables(out=tmp_path), Console(quiet=True))
    assert (tmp_path / "one.md").read_text() == "| a |\n"
