"""When operations run: a longest path through streams, exact at any depth.

Streams are in-order queues; an operation starts when its stream is free and its arguments are
ready. In max-plus algebra (max for +, + for *) one loop iteration is then a matrix that maps the
ready times of carries and streams to those after it, and L iterations are its L-th power, found in
log2(L) products. Time and gradient of 61 layers thus cost little more than of one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cmjax.cost.engines import largest
from cmjax.program import Program, Source

NEVER = -1e6
"""Max-plus zero in seconds: 'does not depend on it'. Finite, so that gradients stay defined."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive operations of one stream between two points where streams meet."""

    operations: tuple[int, ...]
    stream: str
    waits: tuple[Source, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per operation of a level: of itself, and that other streams wait for it longer."""

    duration: Float[Array, "*iterations operations"]
    skew: Float[Array, "*iterations operations"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ready:
    """Ready times after a program level: of each carried output, each stream, and of everything."""

    carries: Float[Array, "carries basis"]
    streams: Float[Array, "streams basis"]
    end: Float[Array, "basis"]


@functools.lru_cache(maxsize=256)
def segments(program: Program) -> tuple[Segment, ...]:
    """Cut a level's operations into segments; the schedule only looks at their ends."""
    stream_of = [op.stream.name for op in program.operations]
    awaited: set[int] = {s.op for s in program.outputs if s.op is not None}
    for i, op in enumerate(program.operations):
        every = (*op.sources, *(op.loop.carry_sources if op.loop else ()))
        awaited |= {
            s.op for s in every if s.op is not None and (op.loop or stream_of[s.op] != stream_of[i])
        }
    found: list[Segment] = []
    open_segment: dict[str, list[int]] = {}
    waits: dict[str, tuple[Source, ...]] = {}
    known: dict[str, set[Source]] = {}

    def close(stream: str) -> None:
        if members := open_segment.pop(stream, None):
            found.append(Segment(tuple(members), stream, waits.pop(stream)))

    for i, op in enumerate(program.operations):
        stream = op.stream.name
        if op.loop is not None:
            for name in list(open_segment):
                close(name)
            found.append(Segment((i,), stream, op.sources))
            continue
        seen = known.setdefault(stream, set())
        new = tuple(
            s for s in op.sources if s not in seen and (s.op is None or _joins(program, s, stream))
        )
        seen |= set(new)
        for source in new:
            if source.op is not None and stream_of[source.op] != stream:
                close(stream_of[source.op])
        if new:
            close(stream)
        if stream not in open_segment:
            open_segment[stream], waits[stream] = [], ()
        waits[stream] += new
        open_segment[stream].append(i)
        if i in awaited:
            close(stream)
    for name in list(open_segment):
        close(name)
    return tuple(found)


def _joins(program: Program, source: Source, stream: str) -> bool:
    """Does waiting for `source` say more than the stream's own order?"""
    producer = program.operations[source.op]  # type: ignore[index]
    return producer.loop is not None or producer.stream.name != stream


def finish(
    program: Program,
    durations: dict[Program, Times],
    streams: tuple[str, ...],
    start: Ready,
    constants,
    temperature: float,
) -> tuple[Ready, dict[Program, Array]]:
    """Run one level.

    Args:
      durations: seconds per operation of this level and, by their programs, of the loops in it; a
        loop's, and those of all loops in it, may have a leading axis of its length, one row per
        iteration.
      streams: names of all streams of the whole program.
      start: ready times of the carried inputs and of the streams, as max-plus vectors over any
        basis (one element for plain times).
      constants: when everything else that the level reads is ready, [basis].
      temperature: 0 for exact maxima, else smoothing in seconds.
    Returns: ready times at the end, and for each loop (by its body) the time that its iterations
      took in all, over every run of it.
    """
    free = dict(zip(streams, start.streams, strict=True))
    done: dict[int, list] = {}
    spans: dict[Program, Array] = {}

    def ready(source: Source):
        if source.op is not None:
            ends = done[source.op]
            return ends[min(source.index, len(ends) - 1)]
        return constants if source.index < 0 else start.carries[source.index]

    def latest(vectors):
        return vectors[0] if len(vectors) == 1 else largest(jnp.stack(vectors), temperature)

    for segment in segments(program):
        operation = program.operations[segment.operations[0]]
        inputs = [_seen(s, ready(s), segment, program, durations) for s in segment.waits]
        if operation.loop is None:
            begin = latest([free[segment.stream], *inputs])
            end = begin + jnp.sum(durations[program].duration[jnp.array(segment.operations)])
            free[segment.stream] = end
            done.update({i: [end] for i in segment.operations})
            continue
        loop = operation.loop
        carried = [ready(s) for s in loop.carry_sources]
        state = jnp.stack([*carried, *(free[s] for s in streams), latest(inputs or [constants])])
        after, inner = _iterate(loop, durations, streams, state, temperature)
        n = loop.carried
        free = dict(zip(streams, after[n : n + len(streams)], strict=True))
        everything = largest(after, temperature)
        # Carried results are ready when computed; scanned-out ones when the loop ends.
        done[segment.operations[0]] = [*after[:n], everything]
        spans |= inner
        spans[loop.body] = jnp.max(everything) - jnp.max(largest(state, temperature))
    carries = [ready(s) for s in program.outputs]
    end = latest([*free.values(), *(e for ends in done.values() for e in ends)] or [start.end])
    basis = constants.shape
    ready_carries = jnp.stack(carries) if carries else jnp.zeros((0, *basis))
    ready_streams = jnp.stack([free[s] for s in streams]) if streams else jnp.zeros((0, *basis))
    return Ready(ready_carries, ready_streams, end), spans


def _seen(source: Source, ready, segment: Segment, program: Program, durations):
    """When a segment may start that needs `source`, which is `ready` on a rank of mean speed."""
    if source.op is None:
        return ready
    ends = program.operations[source.op]
    begins = program.operations[segment.operations[0]]
    if ends.loop or begins.loop or ends.stream.name == segment.stream:
        return ready
    return ready + durations[program].skew[source.op]


def _iterate(loop, durations, streams, state, temperature):
    """Apply `loop.length` iterations to `state` [carries + streams + 1, basis]."""
    size = state.shape[0]
    identity = jnp.where(jnp.eye(size, dtype=bool), 0.0, NEVER).astype(state.dtype)

    def matrix(durations):
        start = Ready(identity[: loop.carried], identity[loop.carried : -1], identity[-1])
        after, spans = finish(
            loop.body,
            durations,
            streams,
            start,
            identity[-1],
            temperature,
        )
        return jnp.concatenate([after.carries, after.streams, identity[-1:]]), spans

    inside = tuple(level for level, _ in loop.body.levels)
    own = {level: durations[level] for level in inside}
    if own[loop.body].duration.ndim == 2:  # a row per iteration, in the loops inside too

        def advance(state, rows):
            step, spans = matrix(dict(zip(inside, rows, strict=True)))
            return _times(step, state, temperature), tuple(spans[body] for body in inside[1:])

        rows = tuple(own[level] for level in inside)
        state, each = jax.lax.scan(advance, state, rows)
        return state, {b: jnp.sum(span, 0) for b, span in zip(inside[1:], each, strict=True)}
    step, spans = matrix(own)
    left = loop.length
    while left:
        if left % 2:
            state = _times(step, state, temperature)
        left //= 2
        if left:
            step = _times(step, step, temperature)
    return state, {body: span * loop.length for body, span in spans.items()}


def _times(a, b, temperature: float):
    """Max-plus matrix product: c[i, j] = max_k a[i, k] + b[k, j]."""
    return largest(a[:, :, None] + b[None, :, :], temperature, axis=1)
