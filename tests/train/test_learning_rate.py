"""Learning rates over a run."""

import pytest

from train.schedule import warmed_up


def test_a_rate_warms_up_over_a_tenth_of_the_steps_and_falls_to_a_tenth():
    rate = warmed_up(2.0, 100)
    found = [float(rate(step)) for step in range(101)]
    assert found[0] == pytest.approx(0.2) and found[10] == pytest.approx(2.0)
    assert found[100] == pytest.approx(0.2)
    assert found[:11] == sorted(found[:11]) and found[10:] == sorted(found[10:], reverse=True)


def test_a_run_of_one_step_has_its_rate():
    assert float(warmed_up(2.0, 1)(0)) == pytest.approx(2.0)
