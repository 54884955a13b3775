"""Software pipelining: operations that a loop issues an iteration ahead.

A stream is an in-order queue. Where it would wait for another stream, work of the next iteration
that is ready already can be issued first, if the code is written so: `ahead()` marks that work, and
here the loop's body is turned round. Its marked operations become those of the next iteration: what
they read from before is now a result of this one, and who reads them finds them carried. As many of
them run as before; that the first iteration's run before the loop, and none in the last one, is
left out.
"""

import dataclasses

from cmjax.program.operation import Loop, Operation, Program, Source


def issued_ahead(body: Program, carried: int) -> tuple[Program, tuple[int, ...]]:
    """The body with its marked operations issued an iteration ahead.

    A marked operation is left where it is if it reads one of its own iteration that is not marked.
    The others are issued once what they need is there, before the first operation of their stream
    that waits for another one.

    Args: a loop's body, and how many inputs are carried from iteration to iteration.
    Returns: the body, and for every input that is carried besides, the number of a carried input
      whose start it shares.
    """
    early = _movable(body)
    if not early:
        return body, ()
    operations = body.operations
    late = [i for i in range(len(operations)) if i not in early]
    at = _place(body, early, late)
    order = [*late[:at], *early, *late[at:]]
    place = {old: new for new, old in enumerate(order)}
    number = {old: carried + k for k, old in enumerate(early)}

    def of_late(source: Source) -> Source:
        if source.op is None:
            return source
        if source.op in early:
            return Source(None, number[source.op])
        return dataclasses.replace(source, op=place[source.op])

    def of_early(source: Source) -> Source:
        if source.op is not None:
            return Source(place[source.op], source.index)
        return of_late(body.outputs[source.index]) if source.index >= 0 else source

    found = tuple(_with_sources(operations[i], of_early if i in early else of_late) for i in order)
    outputs = (*map(of_late, body.outputs), *(Source(place[i], 0) for i in early))
    turned = dataclasses.replace(body, operations=found, outputs=outputs)
    return turned, tuple(_starts_with(body, i) for i in early)


def _movable(body: Program) -> list[int]:
    """Marked operations that read carried inputs only, or one another."""
    found: list[int] = []
    for i, op in enumerate(body.operations):
        alone = all(s.op is None or s.op in found for s in op.sources)
        if op.ahead and op.loop is None and alone:
            found.append(i)
    # what follows from itself a whole iteration later cannot be earlier
    given = {s.op for s in body.outputs}
    return [] if given & set(found) else found


def _place(body: Program, early: list[int], late: list[int]) -> int:
    """Where among the operations that stay the others go."""
    read = {s.index for i in early for s in body.operations[i].sources if s.op is None}
    needed = {body.outputs[k].op for k in read if k >= 0}
    first = max((late.index(op) + 1 for op in needed if op is not None), default=0)
    stream = body.operations[early[0]].stream.name
    for at in range(first, len(late)):
        op = body.operations[late[at]]
        if op.stream.name == stream and any(
            s.op is not None and body.operations[s.op].stream.name != stream for s in op.sources
        ):
            return at
    return len(late)


def _starts_with(body: Program, operation: int) -> int:
    """A carried input that a marked operation depends on, or -1 if it depends on none."""
    for source in body.operations[operation].sources:
        index = source.index if source.op is None else _starts_with(body, source.op)
        if index >= 0:
            return index
    return -1


def _with_sources(op: Operation, change) -> Operation:
    loop: Loop | None = op.loop and dataclasses.replace(
        op.loop, carry_sources=tuple(map(change, op.loop.carry_sources))
    )
    return dataclasses.replace(op, sources=tuple(map(change, op.sources)), loop=loop)
