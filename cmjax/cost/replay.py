"""A priced program run forward in time, operation by operation; no max-plus algebra is used."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from cmjax.program import Program, Source


@dataclasses.dataclass(frozen=True)
class Event:
    """One operation as it ran: when, on which stream, in which iteration of the loops around it."""

    name: str
    scope: str
    stream: str
    start_s: float
    duration_s: float
    iteration: tuple[int, ...]
    after: int | None
    """Index of the event whose end set this start; `None` at the beginning."""

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


def replay(
    program: Program,
    durations: Mapping[Program, np.ndarray],
    skews: Mapping[Program, np.ndarray],
) -> list[Event]:
    """Every operation of a run in issue order, loops unrolled.

    Args:
      program: what is run.
      durations: seconds per operation of every level, with a leading axis for each loop around it
        whose iterations differ.
      skews: likewise, what other streams wait longer for it.
    """
    return _Replay(program, durations, skews).events


class _Replay:
    """Runs the streams forward in time."""

    def __init__(
        self,
        program: Program,
        durations: Mapping[Program, np.ndarray],
        skews: Mapping[Program, np.ndarray],
    ):
        self.events: list[Event] = []
        self.durations, self.skews = durations, skews
        self.free: dict[str, int | None] = dict.fromkeys(program.streams)
        self.level(program, [], None, (), ())

    def latest(self, candidates) -> int | None:
        """The event that ends last among the given ones (`None` is the start of time)."""
        known = [c for c in candidates if c is not None]
        return max(known, key=lambda i: self.events[i].end_s, default=None)

    def level(self, program: Program, carries, constants, iteration, row) -> list[int | None]:
        """One run of a level, in an iteration of the loops around it; `row` are the numbers of
        those whose iterations differ."""
        done: dict[int, list[int | None]] = {}

        def ready(source: Source) -> int | None:
            if source.op is not None:
                ends = done[source.op]
                return ends[min(source.index, len(ends) - 1)]
            return constants if source.index < 0 else carries[source.index]

        durations, skews = self.durations[program][row], self.skews[program][row]

        def seen(source: Source, stream: str) -> float:
            """When a kernel on `stream` may start that needs `source`."""
            event = ready(source)
            if event is None:
                return 0.0
            end = self.events[event].end_s
            producer = None if source.op is None else program.operations[source.op]
            apart = producer and not producer.loop and producer.stream.name != stream
            return end + float(skews[source.op]) if apart else end

        for i, op in enumerate(program.operations):
            waits = [ready(s) for s in op.sources]
            if op.loop is None:
                after = self.latest([self.free[op.stream.name], *waits])
                start = 0.0 if after is None else self.events[after].end_s
                for source in op.sources:
                    if (when := seen(source, op.stream.name)) > start:
                        start, after = when, ready(source)
                scope = "/".join(op.scope)
                self.events.append(
                    Event(
                        op.name, scope, op.stream.name, start, float(durations[i]), iteration, after
                    )
                )
                self.free[op.stream.name] = len(self.events) - 1
                done[i] = [len(self.events) - 1]
                continue
            state = [ready(s) for s in op.loop.carry_sources]
            inner = self.latest(waits or [constants])
            body = op.loop.body
            differ = self.durations[body].ndim > self.durations[program].ndim
            for n in range(op.loop.length):
                inner_row = (*row, n) if differ else row
                state = self.level(body, state, inner, (*iteration, n), inner_row)
            everything = self.latest([*state, inner, *self.free.values()])
            done[i] = [*state, everything]
        return [ready(s) for s in program.outputs]
