"""What a price says: total time, work by engine and scope, the critical path, a trace file."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cmjax.cost.engines import Seconds
from cmjax.program import Operation, Program, Source


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


@dataclasses.dataclass(frozen=True)
class LoopTime:
    """A loop of the program: its scope, and the seconds that one of `length` iterations takes, in
    all and busy on each stream."""

    scope: str
    length: int
    each_s: Float[Array, ""]
    streams_s: dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Timeline:
    """The priced run of a program. A pytree: differentiable and batchable like any other.

    Fields:
      total_s: from the first operation's start to the last one's end.
      parts: seconds per operation and engine, for every one of `program.levels`.
      spans: seconds that a level took in all, for every one of `program.levels`.
    """

    total_s: Float[Array, ""]
    parts: tuple[Seconds, ...]
    spans: tuple[Float[Array, ""], ...]
    program: Program = dataclasses.field(metadata={"static": True})

    @property
    def engines(self) -> dict[str, Array]:
        """Busy seconds of each engine over the whole run."""
        names = ("cube", "vector", "hbm", "fabric")
        totals: dict[str, Array] = dict.fromkeys(names, jnp.zeros(()))
        for (_, times), part in zip(self.program.levels, self.parts, strict=True):
            for name in names:
                totals[name] = totals[name] + times * jnp.sum(_mean(part, name))
        return totals

    @property
    def scopes(self) -> dict[str, Array]:
        """Seconds on its stream of every named scope, without what is nested in named children."""
        totals: dict[str, Array] = {}
        for (level, times), part in zip(self.program.levels, self.parts, strict=True):
            duration = _mean(part, "total")
            for i, op in enumerate(level.operations):
                if op.loop is None:
                    key = "/".join(s for s in op.scope if not s.startswith("microbatch"))
                    totals[key] = totals.get(key, jnp.zeros(())) + times * duration[i]
        return totals

    @property
    def loops(self) -> list[LoopTime]:
        """Every loop of the program, in the order they are issued."""
        bodies = [level for level, _ in self.program.levels]
        return [
            self._loop(op, bodies.index(op.loop.body))
            for level in bodies
            for op in level.operations
            if op.loop is not None
        ]

    def _loop(self, op: Operation, level: int) -> LoopTime:
        assert op.loop is not None
        streams: dict[str, Array] = {}
        for i, inner in enumerate(op.loop.body.operations):
            busy = _mean(self.parts[level], "total")[i]
            streams[inner.stream.name] = streams.get(inner.stream.name, jnp.zeros(())) + busy
        length = op.loop.length
        return LoopTime("/".join(op.scope), length, self.spans[level] / length, streams)

    def events(self) -> list[Event]:
        """Every operation of the run in issue order, loops unrolled (one configuration only).

        The schedule is replayed event by event here, independently of the max-plus algebra.
        """
        if jnp.ndim(self.total_s):
            raise ValueError("events: the timeline is batched; index it to one configuration first")
        return _Replay(self).events

    def critical_path(self) -> list[Event]:
        """The chain of events that sets `total_s`, in order of time."""
        events = self.events()
        if not events:
            return []
        at: int | None = max(range(len(events)), key=lambda i: _end(events[i]))
        path = []
        while at is not None:
            path.append(events[at])
            at = events[at].after
        return path[::-1]

    def to_perfetto(self, path: str | Path) -> None:
        """Write the run as a Chrome trace, to open at ui.perfetto.dev: one track per stream."""
        streams = {name: i for i, name in enumerate(self.program.streams)}
        rows = [
            {"ph": "M", "pid": 0, "tid": i, "name": "thread_name", "args": {"name": name}}
            for name, i in streams.items()
        ]
        rows += [
            {
                "ph": "X",
                "pid": 0,
                "tid": streams[e.stream],
                "name": e.name,
                "cat": e.scope,
                "ts": e.start_s * 1e6,
                "dur": e.duration_s * 1e6,
                "args": {"scope": e.scope, "iteration": list(e.iteration)},
            }
            for e in self.events()
        ]
        Path(path).write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))


def _mean(part: Seconds, name: str) -> Array:
    """Seconds per operation; the mean over iterations where they differ."""
    array = getattr(part, name)
    return jnp.mean(array, 0) if array.ndim == 2 else array


def _end(event: Event) -> float:
    return event.start_s + event.duration_s


class _Replay:
    """Runs the streams forward in time, operation by operation."""

    def __init__(self, timeline: Timeline):
        self.events: list[Event] = []
        self.durations = {
            level: np.asarray(part.total, float)
            for (level, _), part in zip(timeline.program.levels, timeline.parts, strict=True)
        }
        self.free: dict[str, int | None] = dict.fromkeys(timeline.program.streams)
        self.level(timeline.program, [], None, ())

    def latest(self, candidates) -> int | None:
        """The event that ends last among the given ones (`None` is the start of time)."""
        known = [c for c in candidates if c is not None]
        return max(known, key=lambda i: _end(self.events[i]), default=None)

    def level(self, program: Program, carries, constants, iteration) -> list[int | None]:
        done: dict[int, list[int | None]] = {}

        def ready(source: Source) -> int | None:
            if source.op is not None:
                ends = done[source.op]
                return ends[min(source.index, len(ends) - 1)]
            return constants if source.index < 0 else carries[source.index]

        durations = self.durations[program]
        if durations.ndim == 2:
            durations = durations[iteration[-1]]
        for i, op in enumerate(program.operations):
            waits = [ready(s) for s in op.sources]
            if op.loop is None:
                after = self.latest([self.free[op.stream.name], *waits])
                start = 0.0 if after is None else _end(self.events[after])
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
            for n in range(op.loop.length):
                state = self.level(op.loop.body, state, inner, (*iteration, n))
            everything = self.latest([*state, inner, *self.free.values()])
            done[i] = [*state, everything]
        return [ready(s) for s in program.outputs]
