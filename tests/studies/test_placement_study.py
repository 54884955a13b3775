"""The placement study runs on any executor and goes on where it stopped."""

import json

import numpy as np
import pytest

from cmjax import placement
from cmjax.console import terminal
from cmjax.sweep import WorkerPool
from studies import placement as study


def tiny() -> study.Case:
    counts = np.random.default_rng(0).random((4, 1, 8)) ** 2 + 0.01
    return study.Case("tiny", placement.Loads(counts[:2], "tiny"), placement.Loads(counts[2:]))


@pytest.mark.slow
def test_rows_of_other_processes_are_those_of_this_one_and_are_kept(tmp_path, monkeypatch):
    case = tiny()
    monkeypatch.setattr(study, "METHODS", ("contiguous", "greedy", "not at these ranks"))
    here = study.rows_of(study.Cell(case, 4, 8)) + study.rows_of(study.Cell(case, 2, 2))
    monkeypatch.setattr(study, "cases", lambda full: iter([case]))
    monkeypatch.setattr(study, "shapes", lambda experts, full: iter([(4, 8), (2, 2)]))
    options = study.Study(out=tmp_path, pool=WorkerPool(workers=2))
    found = study.run(options, terminal())

    def known(rows):
        """Without the time it took; by the methods that this process was told to try."""
        return [
            {k: v for k, v in row.items() if k != "solve_s"}
            for row in rows
            if row["method"] in ("contiguous", "greedy")
        ]

    assert known(found) == known(here)
    kept = [json.loads(line) for line in (tmp_path / "placement.jsonl").read_text().splitlines()]
    assert len(kept) == len(found)
    monkeypatch.setattr(study, "rows_of", None)  # nothing is left to compute
    assert study.run(options, terminal()) == found
