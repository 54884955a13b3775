"""Pipeline schedules against closed forms of the papers and an event-by-event replay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.parallelism import bubble, in_flight, pipeline_s, replay
from cmjax.parallelism.schedules import StageTimes


@pytest.mark.parametrize(
    "micro_batches, stages, chunks, share",
    [
        (32, 16, 1, 15 / 47),  # PanGu-alpha 200B
        (16, 8, 1, 7 / 23),  # Pangu Ultra reports 30.45 %
        (16, 8, 6, 7 / 103),  # and 6.8 % with six virtual stages
        (5, 1, 1, 0.0),
    ],
)
def test_the_bubble_of_published_runs(micro_batches, stages, chunks, share):
    schedule = "interleaved" if chunks > 1 else "1f1b"
    assert bubble(schedule, micro_batches, stages, chunks) == pytest.approx(share, rel=1e-12)


@given(m=st.integers(1, 12), p=st.integers(1, 6), schedule=st.sampled_from(["gpipe", "1f1b"]))
def test_equal_stages_take_what_the_replay_takes(m, p, schedule):
    times = StageTimes(slowest=3.0, total=3.0 * p, weights=0.0, send=0.0)
    replayed = replay(schedule, [1.0] * p, [2.0] * p, m)
    assert pipeline_s(schedule, times, m, p) == pytest.approx(replayed, rel=1e-12)
    idle = replayed - 3.0 * m
    assert bubble(schedule, m, p) == pytest.approx(idle / replayed, abs=1e-12)


def test_unequal_ends_are_within_two_percent_of_the_replay():
    forward, backward = [1.2, 1.0, 1.0, 1.5], [2.4, 2.0, 2.0, 3.0]
    total = sum(forward) + sum(backward)
    times = StageTimes(slowest=4.5, total=total, weights=0.0, send=0.0)
    assert pipeline_s("1f1b", times, 32, 4) == pytest.approx(
        replay("1f1b", forward, backward, 32), rel=0.02
    )


def test_zero_bubble_leaves_a_third_of_the_bubble_when_its_parts_are_equal():
    times = StageTimes(slowest=3.0, total=24.0, weights=8.0, send=0.0)
    plain, less = (pipeline_s(name, times, 16, 8) for name in ("1f1b", "zero_bubble"))
    assert less - 48.0 == pytest.approx((plain - 48.0) / 3)


def test_micro_batches_in_flight():
    assert in_flight("gpipe", 32, 4) == 32
    assert in_flight("1f1b", 32, 4) == 4
    assert in_flight("1f1b", 2, 4) == 2
    assert in_flight("interleaved", 64, 8, 3) == pytest.approx(8 * (1 + 7 / 24))
