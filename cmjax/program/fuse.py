"""Merge nodes into kernels, as a compiler would, and charge HBM once for each.

Rules: an element-wise operation joins the kernel of its producers; a reduction ends a kernel; a
matrix product, collective, scatter or sort is a kernel of its own; everything inside one `fused`
function is one kernel. A kernel reads what it does not compute and writes what others need.

No cycle can arise: every node gets a level, an edge either joins two nodes of one level or leads
to a higher one, and a kernel holds nodes of one level only.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence

import jax.numpy as jnp

from cmjax.program.choice import Choices
from cmjax.program.operation import Loop, Node, Operation, Program, Source, Value
from cmjax.program.size import Size
from cmjax.program.work import FIELDS, Work


def assemble(
    nodes: list[Node], outputs: Sequence[Value | None], carried: int, choices: Choices
) -> Program:
    """Fuse the nodes of one program level and order the kernels for issue."""
    alive = _alive(nodes, outputs)
    nodes = [node for node in nodes if node.index in alive]
    group_of = _group(nodes, choices)
    members: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        members[group_of[node.index]].append(node)
    needed_outside = _needed_outside(nodes, outputs, group_of)
    order = _issue_order(members, group_of)
    position = {group: i for i, group in enumerate(order)}
    # Where node k's outputs are to be found once it is part of a kernel.
    place = {node.index: (position[group_of[node.index]], node.kind == "loop") for node in nodes}
    operations = tuple(
        _operation(members[g], group_of, needed_outside, place, choices) for g in order
    )
    outs = tuple(_source(value, place) for value in outputs[:carried])
    return Program(operations, outs)


def _alive(nodes: list[Node], outputs: Sequence[Value | None]) -> set[int]:
    """Nodes that some output depends on; the rest is dead code that no compiler would run."""
    by_index = {node.index: node for node in nodes}
    todo = [v.producer[0] for v in outputs if v is not None and v.producer]
    alive: set[int] = set()
    while todo:
        index = todo.pop()
        if index not in alive:
            alive.add(index)
            todo += [v.producer[0] for v in by_index[index].inputs if v is not None and v.producer]
    return alive


def _group(nodes: list[Node], choices: Choices) -> dict[int, int]:
    """Kernel number of each node: union of the edges that stay on one level."""
    by_index = {node.index: node for node in nodes}
    parent = {node.index: node.index for node in nodes}
    level: dict[int, int] = {}
    region_level = _region_floors(nodes)
    region_head: dict[int, int] = {}

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for node in nodes:
        producers = [by_index[v.producer[0]] for v in node.inputs if v is not None and v.producer]
        if node.region is not None:
            floors = [level[index] + 1 for index in region_level[node.region]]
            level[node.index] = max(floors, default=0)
            head = region_head.setdefault(node.region, node.index)
            parent[find(node.index)] = find(head)
            continue
        joins = [p for p in producers if _compatible(p, node, choices)]
        level[node.index] = max(
            [level[p.index] + (0 if p in joins else 1) for p in producers], default=0
        )
        for p in joins:
            if level[p.index] == level[node.index]:
                parent[find(node.index)] = find(p.index)
    return {node.index: find(node.index) for node in nodes}


def _region_floors(nodes: list[Node]) -> dict[int, set[int]]:
    """For every fused region, the nodes outside it that it reads."""
    region = {node.index: node.region for node in nodes}
    floors: dict[int, set[int]] = defaultdict(set)
    for node in nodes:
        if node.region is not None:
            inside = floors[node.region]
            inside |= {
                v.producer[0]
                for v in node.inputs
                if v is not None and v.producer and region[v.producer[0]] != node.region
            }
    return floors


def _compatible(producer: Node, node: Node, choices: Choices) -> bool:
    """May `node` be computed in the loop that computes `producer`?"""
    return (
        producer.kind == "elementwise"
        and node.kind in ("elementwise", "reduce")
        and producer.region is None
        and producer.stream == node.stream
        and producer.scope == node.scope
        and producer.ahead == node.ahead
        and producer.shard_map == node.shard_map
        and choices.at_most(producer.outputs[0].operand.size, _iteration_size(node, choices))
    )


def _iteration_size(node: Node, choices: Choices) -> Size:
    operands = [v.operand for v in node.inputs if v is not None] + [node.outputs[0].operand]
    sizes = [operand.size for operand in operands]
    return sizes[choices.largest(sizes)]


def _needed_outside(nodes, outputs, group_of) -> set[int]:
    """`id`s of the values that another kernel, or the program's caller, reads."""
    owner = {id(v): group_of[node.index] for node in nodes for v in node.outputs}
    needed = {id(v.root) for v in outputs if v is not None}
    for node in nodes:
        for value in node.inputs:
            if value is not None and owner.get(id(value.root)) != group_of[node.index]:
                needed.add(id(value.root))
    return needed


def _issue_order(members: dict[int, list[Node]], group_of: dict[int, int]) -> list[int]:
    """Program order of the kernels' first nodes, as far as dependencies allow."""
    waits: dict[int, set[int]] = {group: set() for group in members}
    for group, nodes in members.items():
        for node in nodes:
            for value in node.inputs:
                if value is not None and value.producer:
                    source = group_of[value.producer[0]]
                    if source != group:
                        waits[group].add(source)
    feeds = defaultdict(list)
    for group, sources in waits.items():
        for source in sources:
            feeds[source].append(group)
    pending = {group: len(sources) for group, sources in waits.items()}
    first = {group: min(node.index for node in nodes) for group, nodes in members.items()}
    ready = [(first[group], group) for group, count in pending.items() if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, group = heapq.heappop(ready)
        order.append(group)
        for consumer in feeds[group]:
            pending[consumer] -= 1
            if pending[consumer] == 0:
                heapq.heappush(ready, (first[consumer], consumer))
    return order


def _operation(nodes: list[Node], group_of, needed_outside, place, choices: Choices) -> Operation:
    head = nodes[0]
    group = group_of[head.index]
    anchor = next((n for n in nodes if n.kind in ("anchor", "loop")), head)
    if head.region is not None:
        scope = head.scope
        while not _is_prefix(scope, nodes):
            scope = scope[:-1]
        name = scope[-1]
    else:
        name, scope = anchor.name, anchor.scope
        if anchor.kind in ("elementwise", "reduce") and len(nodes) > 1:
            name = "+".join(
                dict.fromkeys(n.name for n in nodes if n.work.column("vector_bytes").terms)
            )
    read, write = _traffic(nodes, group, group_of, needed_outside, choices)
    if head.region is None and anchor.kind == "anchor":
        read = read if anchor.work.read_bytes is None else Size.of(anchor.work.read_bytes)
        write = write if anchor.work.write_bytes is None else Size.of(anchor.work.write_bytes)
    totals = {f: _total(nodes, f) for f in FIELDS}
    totals |= {"read_bytes": read, "write_bytes": write, "launches": _launches(nodes, anchor)}
    kinds = [n.work.kind for n in nodes if n.work.kind != "compute"]
    work = Work(
        **totals,
        kind=kinds[0] if kinds else "compute",
        reach=max(n.work.reach for n in nodes),
        ranks=max(n.work.ranks for n in nodes),
    )
    sources = {
        _source(v, place)
        for n in nodes
        for v in n.inputs
        if v is not None and not (v.producer and group_of[v.producer[0]] == group)
    }
    loop = anchor.loop
    if loop is not None:
        carries = tuple(_source(v, place) for v in anchor.carry_inputs)
        loop = Loop(loop.body, loop.length, loop.carried, carries)
        sources -= set(carries)
    ordered = tuple(sorted(sources, key=lambda s: (-1 if s.op is None else s.op, s.index)))
    return Operation(name or "const", scope, head.stream, work, ordered, loop, head.ahead)


def _total(nodes: list[Node], field: str) -> Size:
    """The sum of a column of work; most are nothing but zeros."""
    return sum((Size.of(x) for n in nodes if (x := getattr(n.work, field))), Size())


def _is_prefix(scope: tuple[str, ...], nodes: list[Node]) -> bool:
    return all(n.scope[: len(scope)] == scope for n in nodes)


def _traffic(
    nodes: list[Node], group: int, group_of, needed_outside, choices: Choices
) -> tuple[Size, Size]:
    """HBM bytes that a kernel reads and writes at its boundary."""
    views: dict[object, dict[object, Value]] = defaultdict(dict)
    read, write = Size(), Size()
    for node in nodes:
        for position, value in enumerate(node.inputs):
            inside = value is not None and value.producer and group_of[value.producer[0]] == group
            if value is None or inside:
                continue
            if position in node.reads:
                read = read + node.reads[position]
            else:
                views[id(value.root), value.shard][value.bytes_seen] = value
    for seen in views.values():
        total = sum((value.nbytes for value in seen.values()), Size())
        whole = next(iter(seen.values())).held
        read = read + (total if choices.at_most(total, whole) else whole)
    for node in nodes:
        for position, value in enumerate(node.outputs):
            if id(value) in needed_outside:
                write = write + node.writes.get(position, value.nbytes)
    return read, write


def _launches(nodes: list[Node], anchor: Node) -> Size:
    """One launch a kernel. Index arithmetic (integers only) is part of the step's metadata."""
    if anchor.kind in ("anchor", "loop"):
        return anchor.work.column("launches") if nodes[0].region is None else Size(1.0)
    operands = [v.operand for n in nodes for v in (*n.inputs, *n.outputs) if v is not None]
    if all(_is_integer(operand.dtype) for operand in operands):
        return Size()
    moved = _total(nodes, "vector_bytes")
    return Size(1.0) if moved.terms else Size()


def _is_integer(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)


def _source(value: Value | None, place) -> Source:
    if value is None or (value.producer is None and value.external is None):
        return Source(None, -1)
    if value.producer is not None:
        op, is_loop = place[value.producer[0]]
        return Source(op, value.producer[1] if is_loop else 0)
    kind, index = value.external  # type: ignore[misc]
    return Source(None, index if kind == "carry" else -1)
