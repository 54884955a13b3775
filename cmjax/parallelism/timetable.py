"""Timetables of a pipeline: which stage does what in which tick, for every schedule.

    1f1b    stage s runs min(m, p - s) forward passes, then one backward, one forward in turns
            (PipeDream-Flush, arXiv 2006.09503); m micro-batches, p stages

A tick is one forward pass, one backward pass or the gradients of one micro-batch's weights. What a
stage sends in a tick is there in the next one. Every stage works through its own order as soon as
what it waits for has come, so the ticks of equal stages are those of `bubble`'s formulas.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from cmjax.parallelism.plan import Schedule

IDLE, FORWARD, BACKWARD, WEIGHTS = range(4)
"""Kinds of work of a tick; `WEIGHTS` apart from `BACKWARD` under zero_bubble alone."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage does in a tick: a kind, for a micro-batch, with one of its chunks of layers."""

    kind: int
    micro_batch: int
    chunk: int = 0


Order = list[Work]
Ticks = list[list[Work | None]]


@dataclasses.dataclass(frozen=True, eq=False)
class Timetable:
    """A schedule tick by tick; all arrays are [ticks, stages].

    Fields:
      stages, chunks, micro_batches: p, v and m.
      kind, micro_batch, chunk: what every stage does.
      x_slot, saved_slot, g_slot: where the work's input, its residuals and its gradient are kept.
      x_comes, g_comes: where what a neighbour sends in this tick is put; -1 where none does.
      x_slots, saved_slots, g_slots: how many there are of each, on the stage that needs most.
    """

    stages: int
    chunks: int
    micro_batches: int
    kind: np.ndarray
    micro_batch: np.ndarray
    chunk: np.ndarray
    x_slot: np.ndarray
    saved_slot: np.ndarray
    g_slot: np.ndarray
    x_comes: np.ndarray
    g_comes: np.ndarray
    x_slots: int
    saved_slots: int
    g_slots: int

    @property
    def ticks(self) -> int:
        return len(self.kind)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first tick, ticks of a period, repetitions): the table as loops.

        Of one stage, every tick of a period is of a known kind. Stages do different things at a
        time, and look up what: all their ticks are one loop, compiled once.
        """
        if self.stages > 1:
            yield 0, 1, self.ticks
            return
        kinds = self.kind[:, 0].tolist()
        tick = 0
        while tick < self.ticks:
            period, times = 1, 1
            for length in range(1, (self.ticks - tick) // 2 + 1):
                count = 1
                while (
                    kinds[tick : tick + length]
                    == kinds[tick + count * length : tick + (count + 1) * length]
                ):
                    count += 1
                # A loop costs a compilation of its period; it is worth it if it saves ticks.
                if count > 1 and (count - 1) * length > (times - 1) * period:
                    period, times = length, count
            yield tick, period, times
            tick += period * times


@functools.lru_cache(maxsize=64)
def timetable(schedule: Schedule, micro_batches: int, stages: int, chunks: int = 1) -> Timetable:
    """The timetable of a schedule.

    >>> table = timetable("1f1b", micro_batches=16, stages=8)
    >>> table.ticks, 2 * (16 + 7), table.saved_slots  # with a bubble of 7 / 23
    (46, 46, 8)
    """
    if schedule == "zero_bubble":
        ticks = _zero_bubble(micro_batches, stages)
    else:
        orders = [_order(schedule, micro_batches, stages, chunks, s) for s in range(stages)]
        ticks = _played(orders, stages, chunks)
    return _tabled(ticks, micro_batches, stages, chunks)


def _order(schedule: Schedule, m: int, p: int, v: int, stage: int) -> Order:
    """All work of a stage, in order: `ahead` forward passes, then backward and forward in turns."""
    if schedule == "interleaved":  # arXiv 2104.04473, section 2.2
        groups = [(k // (p * v) * p + k % p, k % (p * v) // p) for k in range(m * v)]
        ahead = min(m * v, (p - stage - 1) * 2 + (v - 1) * p + 1)
        forward = [Work(FORWARD, i, c) for i, c in groups]
        backward = [Work(BACKWARD, i, v - 1 - c) for i, c in groups]
    else:
        ahead = m if schedule == "gpipe" else min(m, p - stage)
        forward = [Work(FORWARD, i) for i in range(m)]
        backward = [Work(BACKWARD, i) for i in range(m)]
    order = forward[:ahead]
    for i, work in enumerate(backward):
        order += [work, *forward[ahead + i : ahead + i + 1]]
    return order


def _before(work: Work, stage: int, p: int, v: int) -> tuple[int, Work] | None:
    """What must be done, and where, before a forward or backward pass can start."""
    i, c = work.micro_batch, work.chunk
    if work.kind == FORWARD:
        if stage:
            return stage - 1, Work(FORWARD, i, c)
        return (p - 1, Work(FORWARD, i, c - 1)) if c else None
    if work.kind == WEIGHTS:
        return stage, Work(BACKWARD, i, c)
    if stage < p - 1:
        return stage + 1, Work(BACKWARD, i, c)
    return (0, Work(BACKWARD, i, c + 1)) if c < v - 1 else (stage, Work(FORWARD, i, c))


def _played(orders: Sequence[Order], p: int, v: int) -> Ticks:
    done: set[tuple[int, Work]] = set()
    place, ticks = [0] * p, []
    while any(place[s] < len(orders[s]) for s in range(p)):
        row: list[Work | None] = [None] * p
        for s in range(p):
            if place[s] < len(orders[s]):
                work = orders[s][place[s]]
                if (needs := _before(work, s, p, v)) is None or needs in done:
                    row[s] = work
                    place[s] += 1
        done.update((s, work) for s, work in enumerate(row) if work is not None)
        ticks.append(row)
    return ticks


def _zero_bubble(m: int, p: int) -> Ticks:
    """ZB-H1 (arXiv 2401.10241): 1F1B, whose gradients of weights fill what would be idle, with no
    more micro-batches kept than 1F1B's first stage has."""
    done: set[tuple[int, Work]] = set()
    counts = [[0] * p for _ in range(4)]  # by kind and stage
    ticks: Ticks = []
    while min(counts[WEIGHTS]) < m:
        row: list[Work | None] = [None] * p
        for s in range(p):
            forward, backward, weights = (counts[k][s] for k in (FORWARD, BACKWARD, WEIGHTS))
            room = forward - backward < p - s and forward - weights < p
            options = [
                (backward < forward, Work(BACKWARD, backward)),
                (forward < m and room, Work(FORWARD, forward)),
                (weights < backward, Work(WEIGHTS, weights)),
            ]
            for allowed, work in options:
                needs = _before(work, s, p, 1)
                if allowed and (needs is None or needs in done):
                    row[s] = work
                    break
        for s, work in enumerate(row):
            if work is not None:
                done.add((s, work))
                counts[work.kind][s] += 1
        ticks.append(row)
    return ticks


def _tabled(ticks: Ticks, m: int, p: int, v: int) -> Timetable:
    at = {(s, work): t for t, row in enumerate(ticks) for s, work in enumerate(row) if work}
    last = WEIGHTS if any(work.kind == WEIGHTS for _, work in at) else BACKWARD
    slots: list[dict[tuple[int, int, int], int]] = []
    numbers = []
    for which in ("x", "saved", "g"):
        found, most = {}, 1
        for s in range(p):
            spans = []
            for i in range(m):
                for c in range(v):
                    begin, end = at[s, Work(FORWARD, i, c)], at[s, Work(last, i, c)]
                    if which == "x":
                        needs = _before(Work(FORWARD, i, c), s, p, v)
                        begin, end = at[needs] if needs else begin, begin
                    if which == "g":
                        source = _before(Work(BACKWARD, i, c), s, p, v)
                        assert source is not None, "a backward pass always waits for something"
                        begin, end = at[source], at[s, Work(BACKWARD, i, c)]
                    spans.append((begin, end, i, c))
            held, count = _coloured(spans)
            found |= {(s, i, c): slot for (i, c), slot in held.items()}
            most = max(most, count)
        slots.append(found)
        numbers.append(most)
    shape = len(ticks), p
    fields = {name: np.zeros(shape, np.int32) for name in _WORK}
    comes = {name: np.full(shape, -1, np.int32) for name in ("x_comes", "g_comes")}
    for t, row in enumerate(ticks):
        for s, work in enumerate(row):
            if work is None:
                continue
            key = (s, work.micro_batch, work.chunk)
            values = (work.kind, work.micro_batch, work.chunk, *(found[key] for found in slots))
            for name, value in zip(_WORK, values, strict=True):
                fields[name][t, s] = value
            if (to := _receiver(work, s, p, v)) is not None:
                name, found = (
                    ("x_comes", slots[0]) if work.kind == FORWARD else ("g_comes", slots[2])
                )
                comes[name][t, to[0]] = found[to]
    return Timetable(p, v, m, **fields, **comes, **dict(zip(_SLOTS, numbers, strict=True)))


_WORK = ("kind", "micro_batch", "chunk", "x_slot", "saved_slot", "g_slot")
_SLOTS = ("x_slots", "saved_slots", "g_slots")


def _receiver(work: Work, stage: int, p: int, v: int) -> tuple[int, int, int] | None:
    """(stage, micro-batch, chunk) of the work that reads what this one gives."""
    i, c = work.micro_batch, work.chunk
    if work.kind == WEIGHTS:
        return None
    if work.kind == FORWARD:
        if stage < p - 1:
            return stage + 1, i, c
        return (0, i, c + 1) if c < v - 1 else None
    if stage:
        return stage - 1, i, c
    return (p - 1, i, c - 1) if c else None


def _coloured(spans: list[tuple[int, int, int, int]]) -> tuple[dict[tuple[int, int], int], int]:
    """A slot for every (begin, end, micro-batch, chunk), so that none is shared at any time."""
    free_from: list[int] = []
    held = {}
    for begin, end, i, c in sorted(spans):
        # What is read in a tick and what arrives at its end may share a slot.
        slot = next((k for k, tick in enumerate(free_from) if tick <= begin), len(free_from))
        free_from[slot : slot + 1] = [end]
        held[i, c] = slot
    return held, len(free_from)
