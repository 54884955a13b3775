"""Timetables: all work once, after what it waits for, in as many ticks as the formula says."""

import itertools

import numpy as np
import pytest

from cmjax.parallelism import bubble, in_flight, timetable
from cmjax.parallelism.timetable import BACKWARD, FORWARD, IDLE, WEIGHTS

CASES = [
    ("gpipe", 4, 4, 1), ("gpipe", 6, 2, 1), ("1f1b", 8, 4, 1), ("1f1b", 2, 4, 1), ("1f1b", 5, 1, 1),
    ("interleaved", 8, 4, 2), ("interleaved", 4, 2, 3), ("interleaved", 4, 4, 2),
    ("zero_bubble", 8, 4, 1), ("zero_bubble", 3, 4, 1),
]  # fmt: skip


def _work(table):
    """(tick, stage, kind, micro-batch, chunk) of everything that is done."""
    for tick, stage in itertools.product(range(table.ticks), range(table.stages)):
        if (kind := table.kind[tick, stage]) != IDLE:
            yield tick, stage, kind, table.micro_batch[tick, stage], table.chunk[tick, stage]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_everything_is_done_once_and_after_what_it_waits_for(case):
    schedule, m, p, v = case
    table = timetable(*case)
    at = {(s, kind, i, c): tick for tick, s, kind, i, c in _work(table)}
    kinds = 3 if schedule == "zero_bubble" else 2
    assert len(at) == len(list(_work(table))) == kinds * m * p * v
    for (s, kind, i, c), tick in at.items():
        if kind == FORWARD and (s or c):
            assert at[(s - 1) % p, FORWARD, i, c - (s == 0)] < tick
        if kind == BACKWARD:
            last = s == p - 1 and c == v - 1
            before = (s, FORWARD, i, c) if last else ((s + 1) % p, BACKWARD, i, c + (s == p - 1))
            assert at[before] < tick
        if kind == WEIGHTS:
            assert at[s, BACKWARD, i, c] < tick


@pytest.mark.parametrize("case", [c for c in CASES if c[0] != "zero_bubble"], ids=str)
def test_the_share_of_idle_ticks_is_the_bubble(case):
    schedule, m, p, v = case
    table = timetable(*case)
    idle = float(np.mean(table.kind == IDLE))
    assert idle == pytest.approx(bubble(schedule, m, p, v))


def test_zero_bubble_idles_less_than_1f1b_and_no_less_than_its_formula():
    for m, p in ((8, 4), (16, 8), (12, 3)):
        idle = float(np.mean(timetable("zero_bubble", m, p).kind == IDLE))
        assert bubble("zero_bubble", m, p) <= idle < bubble("1f1b", m, p)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_slot_holds_two_things_at_once(case):
    schedule, _, p, _ = case
    table = timetable(*case)
    end = WEIGHTS if schedule == "zero_bubble" else BACKWARD
    for stage in range(p):
        held: dict[int, tuple] = {}
        for _, s, kind, i, c in _work(table):
            if s != stage:
                continue
            tick = next(t for t, *rest in _work(table) if rest == [s, kind, i, c])
            slot = int(table.saved_slot[tick, s])
            if kind == FORWARD:
                assert slot not in held
                held[slot] = (i, c)
            else:
                assert held[slot] == (i, c)
                if kind == end:
                    del held[slot]
        assert not held


@pytest.mark.parametrize("case", [c for c in CASES if c[0] in ("gpipe", "1f1b")], ids=str)
def test_as_many_micro_batches_are_kept_as_memory_is_counted_for(case):
    schedule, m, p, v = case
    assert timetable(*case).saved_slots == in_flight(schedule, m, p, v)


def test_runs_cover_every_tick_in_order():
    for case in CASES:
        table = timetable(*case)
        ticks = [t for first, n, times in table.runs() for t in range(first, first + n * times)]
        assert ticks == list(range(table.ticks))


def test_ticks_of_one_stage_are_of_the_same_kind_in_every_round_of_a_loop():
    for schedule, kinds in (("gpipe", 2), ("1f1b", 2), ("zero_bubble", 3)):
        table = timetable(schedule, 5, 1)
        compiled = 0
        for first, period, times in table.runs():
            compiled += period
            for tick in range(first, first + period * (times - 1)):
                assert table.kind[tick, 0] == table.kind[tick + period, 0]
        assert compiled == kinds


def test_all_ticks_of_several_stages_are_one_loop():
    for case in (case for case in CASES if case[2] > 1):
        table = timetable(*case)
        assert list(table.runs()) == [(0, 1, table.ticks)]
