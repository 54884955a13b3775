"""What a price says: total time, work by engine and scope, the critical path, a trace file."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from cmjax.cost.describe import html, one_line
from cmjax.cost.engines import Seconds
from cmjax.cost.replay import Event, replay
from cmjax.files import replace_text
from cmjax.hardware import TIERS
from cmjax.program import FIELDS, Loop, Program

ENGINES = ("cube", "vector", "hbm", "fabric")
"""What an operation can keep busy, as `Seconds` names it."""
WAITING = "waiting for the slowest rank"
"""Name of the time before exchanges, among the scopes."""


@dataclasses.dataclass(frozen=True)
class LoopTime:
    """A loop of the program: its scope, and the seconds that one of `length` iterations takes, in
    all and busy on each stream (the mean of them where they differ)."""

    scope: str
    length: int
    each_s: Float[Array, "*batch"]
    streams_s: dict[str, Float[Array, "*batch"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Timeline:
    """The priced run of a program. A pytree: differentiable and batchable like any other.

    Under `jax.vmap` every field and property gets the batch's axes in front. Loops around an
    operation whose iterations differ (a size with a value for each) are axes as well.

    Fields:
      total_s: from the first operation's start to the last one's end.
      parts: seconds per operation and engine, for every one of `program.levels`.
      spans: seconds that a level took, all its runs together, for every one of `program.levels`.
      work: what every operation asks of the machine, `[len(FIELDS), operations]`, for every one of
        `program.levels`.
      program: what was priced.
    """

    total_s: Float[Array, "*batch"]
    parts: tuple[Seconds, ...]
    spans: tuple[Float[Array, "*batch"], ...]
    work: tuple[Float[Array, "*_batch_and_loops fields _operations"], ...]
    program: Program = dataclasses.field(metadata={"static": True})

    @property
    def flops(self) -> Float[Array, "*batch"]:
        """FLOP of one rank over the whole run, matrix products and everything else."""
        return self._total("flops")

    @property
    def hbm_bytes(self) -> Float[Array, "*batch"]:
        """Bytes that one rank reads from its HBM and writes to it."""
        return self._total("read_bytes", "write_bytes")

    @property
    def link_bytes(self) -> dict[str, Float[Array, "*batch"]]:
        """Bytes that one rank sends, by the tier of the receiver."""
        return {tier: self._total(f"{tier}_bytes") for tier in TIERS}

    @property
    def engines(self) -> dict[str, Float[Array, "*batch"]]:
        """Busy seconds of each engine over the whole run."""
        return {
            name: sum(
                (
                    times * jnp.sum(self._mean(getattr(part, name)), -1)
                    for (_, times), part in zip(self.program.levels, self.parts, strict=True)
                ),
                jnp.zeros(()),
            )
            for name in ENGINES
        }

    @property
    def scopes(self) -> dict[str, Float[Array, "*batch"]]:
        """Seconds on its stream of every named scope, without what is nested in named children.

        Time that exchanges wait for the slowest rank is under `WAITING`.
        """
        scopes = self._by_scope([part.total - part.waiting for part in self.parts])
        waits = self._by_scope([part.waiting for part in self.parts])
        exchanging = any(
            op.work.ranks > 1 for level, _ in self.program.levels for op in level.operations
        )
        return scopes | ({WAITING: sum(waits.values(), jnp.zeros(()))} if exchanging else {})

    @property
    def scope_flops(self) -> dict[str, Float[Array, "*batch"]]:
        """FLOP of every named scope, without what is nested in named children."""
        return self._by_scope([_columns(table, "flops") for table in self.work])

    @property
    def scope_hbm_bytes(self) -> dict[str, Float[Array, "*batch"]]:
        """HBM bytes of every named scope, without what is nested in named children."""
        return self._by_scope([_columns(table, "read_bytes", "write_bytes") for table in self.work])

    @property
    def loops(self) -> list[LoopTime]:
        """Every loop of the program, in the order they are issued."""
        levels = self.program.levels
        number = {level: i for i, (level, _) in enumerate(levels)}
        return [
            self._loop("/".join(op.scope), op.loop, number[op.loop.body])
            for level, _ in levels
            for op in level.operations
            if op.loop is not None
        ]

    def to_dict(self) -> dict:
        """The run in numbers, ready for JSON: FLOP and bytes, seconds by scope, engine and loop.

        Numbers of one rank; lists where the timeline is batched.
        """
        flops, nbytes = self.scope_flops, self.scope_hbm_bytes
        return {
            "total_s": _plain(self.total_s),
            "flops": _plain(self.flops),
            "hbm_bytes": _plain(self.hbm_bytes),
            "link_bytes": {tier: _plain(sent) for tier, sent in self.link_bytes.items()},
            "engines_s": {name: _plain(busy) for name, busy in self.engines.items()},
            "scopes": {
                scope: {
                    "seconds": _plain(seconds),
                    "flops": _plain(flops.get(scope, 0.0)),
                    "hbm_bytes": _plain(nbytes.get(scope, 0.0)),
                }
                for scope, seconds in self.scopes.items()
            },
            "loops": [
                {
                    "scope": loop.scope,
                    "length": loop.length,
                    "each_s": _plain(loop.each_s),
                    "streams_s": {name: _plain(busy) for name, busy in loop.streams_s.items()},
                }
                for loop in self.loops
            ],
        }

    def __repr__(self) -> str:
        operations = sum(len(level.operations) for level, _ in self.program.levels)
        if isinstance(self.total_s, Tracer):
            return f"Timeline({operations} operations, traced)"
        if not isinstance(self.total_s, float | np.generic | np.ndarray | jax.Array):
            return f"Timeline({self.total_s!r})"  # in a tree of something else, such as axes
        if jnp.ndim(self.total_s):
            return f"Timeline({operations} operations, batch {jnp.shape(self.total_s)})"
        return f"Timeline({one_line(self.to_dict())})"

    def _repr_html_(self) -> str:
        """A notebook's picture: totals, then FLOP, bytes and time by scope and by engine."""
        if isinstance(self.total_s, Tracer) or jnp.ndim(self.total_s):
            return f"<pre>{self!r}</pre>"
        return html(self.to_dict())

    def _total(self, *fields: str) -> Array:
        amounts = (
            times * jnp.sum(self._mean(_columns(table, *fields)), -1)
            for (_, times), table in zip(self.program.levels, self.work, strict=True)
        )
        return sum(amounts, jnp.zeros(()))

    def _by_scope(self, levels: list[Array]) -> dict[str, Array]:
        """Sums over the operations of every scope, of arrays with one number per operation."""
        totals: dict[str, Array] = {}
        for (level, times), amounts in zip(self.program.levels, levels, strict=True):
            each = self._mean(amounts)
            for i, op in enumerate(level.operations):
                if op.loop is None:
                    key = "/".join(s for s in op.scope if not s.startswith("microbatch"))
                    totals[key] = totals.get(key, jnp.zeros(())) + times * each[..., i]
        return totals

    def _mean(self, amounts: Array) -> Array:
        """[*batch, operations]: means over loop iterations where they differ."""
        return jnp.mean(amounts, tuple(range(jnp.ndim(self.total_s), amounts.ndim - 1)))

    def _loop(self, scope: str, loop: Loop, number: int) -> LoopTime:
        level, times = self.program.levels[number]
        busy = self._mean(self.parts[number].total)
        streams: dict[str, Array] = {}
        for i, inner in enumerate(level.operations):
            name = inner.stream.name
            streams[name] = streams.get(name, jnp.zeros(())) + busy[..., i]
        return LoopTime(scope, loop.length, self.spans[number] / times, streams)

    def events(self) -> list[Event]:
        """Every operation of the run in issue order, loops unrolled (one configuration only).

        The schedule is replayed event by event here, independently of the max-plus algebra.
        """
        if jnp.ndim(self.total_s):
            raise ValueError("events: the timeline is batched; index it to one configuration first")
        parts = zip(self.program.levels, self.parts, strict=True)
        durations, skews = {}, {}
        for (level, _), part in parts:
            durations[level] = np.asarray(part.total, float)
            skews[level] = np.asarray(part.skew, float)
        return replay(self.program, durations, skews)

    def critical_path(self) -> list[Event]:
        """The chain of events that sets `total_s`, in order of time."""
        events = self.events()
        if not events:
            return []
        at: int | None = max(range(len(events)), key=lambda i: events[i].end_s)
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
        replace_text(path, json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))


def _columns(table: Array, *fields: str) -> Array:
    """Some work fields of every operation, added up."""
    return sum((table[..., FIELDS.index(field), :] for field in fields), jnp.zeros(()))


def _plain(value) -> float | list:
    return np.asarray(value, float).tolist()
