"""The steps of another simulator: its errors are as published, and the table has every row."""

import pytest

from studies import mindstudio
from studies.mindstudio import STEPS


def test_its_errors_follow_from_the_published_numbers():
    found = [round(100 * step.simulated_error, 1) for step in STEPS]
    assert found == [5.5, 6.0, 0.0, -17.4, -6.1]


def test_ranks_and_queries_are_those_of_the_rows():
    for step in STEPS:
        deployment = step.deployment
        dies = 1 if step.on == "atlas-800-a2" else 2
        queries = step.batch * deployment.instance_npus
        assert f"TP{deployment.tp}" in step.row
        assert f": {queries:g} quer" in step.row
        assert deployment.instance_npus * dies % deployment.tp == 0


@pytest.mark.slow
def test_the_steps_are_nearer_on_average_than_its_simulation_and_none_is_as_far_off():
    ours = [abs(step.predicted_ms() / step.baseline_ms - 1) for step in STEPS]
    theirs = [abs(step.simulated_error) for step in STEPS]
    assert sum(ours) < sum(theirs)
    assert max(ours) < max(theirs)


def test_the_last_line_is_the_mean_of_absolute_errors(monkeypatch):
    monkeypatch.setattr(
        mindstudio.Step,
        "predicted_ms",
        lambda step: step.baseline_ms * (1.1 if step.batch > 1 else 0.7),
    )
    *rows, mean = mindstudio.cells()
    assert len(rows) == len(STEPS)
    assert mean[-1] == f"{(10 + 10 + 30 + 10 + 10) / 5:.1f}"
    assert mean[-2] == f"{(5.53 + 6.04 + 0 + 17.39 + 6.10) / 5:.1f}"
