"""What the study of shift says is what its rows say."""

from pathlib import Path

import numpy as np
import pytest

from cmjax.placement import Loads
from studies.placement_shift import RULES, cell, joined, over_best, plot, read_rows, summary

ROWS = Path(__file__).parents[2] / "docs" / "placement_shift.csv"


def test_the_rows_of_the_manual_say_what_the_manual_says():
    rows = read_rows(ROWS)
    under = np.mean([100 * (row["robust"] / row["greedy"] - 1) for row in rows])
    over = np.array([over_best(row, "robust") for row in rows])
    text = (ROWS.parent / "placing.md").read_text()
    cells = f"{under:.1f} | {over.mean():.1f} | {over.max():.1f} | {(over > 2).sum()}"
    assert f"| robust | {cells} |" in text
    assert f"more than 2 % in {(over > 2).sum()} of {len(rows)} cells" in summary(rows)


def test_the_picture_is_drawn_from_the_rows(tmp_path):
    plot(read_rows(ROWS), tmp_path / "shift.svg")
    assert "robust" in (tmp_path / "shift.svg").read_text()


def test_a_cell_judges_every_way_on_the_domain_left_out():
    counts = np.random.default_rng(0).random((3, 8, 16)) ** 2 + 0.01
    family = {name: Loads(counts[n]) for n, name in enumerate(("law", "art", "code"))}
    loads = joined(family, 2)
    assert loads.counts.shape == (3, 2, 16)
    row = cell(loads, 8, 1)
    times = [row[name] for name in (*RULES, "search", "robust")]
    assert min(times) >= row["bound"] * (1 - 1e-9)
    assert over_best(row, min(RULES, key=lambda name: row[name])) == pytest.approx(0)
