"""Where a plan's dimensions lie, and the bytes a collective then sends over each tier of links.

A rank's neighbours are filled in the plan's order: its first dimension takes the ranks of an NPU,
then those of a node, and so on (PanGu-alpha, section 4.1: tensor in the server, pipeline in the
rack, data across). Where tiers are networks of their own, a group of n = a x b x c ranks on the
three tiers passes its data round in rings, as many as a node has NICs (NCCL). Of the N bytes of an
all-gather every edge of a ring carries (n-1)/n, so a rank sends (n-1)/n N over the first tier,
1/a of that over the second, and 1/(ab) of it over the third, as far as the group reaches. On a
Unified Bus, whose ranks reach every other alike, it sends to each directly.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from cmjax.hardware import TIERS, Supernode
from cmjax.parallelism.plan import DIMENSIONS, Plan
from cmjax.program import Program, Size

On = tuple[int, int, int]
"""Ranks of a group by tier."""
GROUPS = {"tensor": "node", "context": "die"}
"""Groups that collectives of a traced piece are over, and the tier that says which one it is."""


def share_names(group: str) -> tuple[str, ...]:
    """Symbols of a program whose collectives over a group may lie on any tiers."""
    return tuple(f"{group}_{tier}_share" for tier in TIERS)


def layout(order: Sequence[str], degrees: Mapping[str, int], machine: Supernode) -> dict[str, On]:
    """Ranks of every dimension by tier, those named first lying closest together.

    >>> from cmjax.hardware import load_machine
    >>> degrees = {"tensor": 8, "pipeline": 16, "data": 16}
    >>> layout(("tensor", "pipeline", "data"), degrees, load_machine("ascend910-2048"))
    {'tensor': (8, 1, 1), 'pipeline': (1, 16, 1), 'data': (1, 1, 16)}
    """
    free = [machine.dies_per_npu, machine.npus_per_node, machine.nodes]
    placed = {}
    for name in order:
        rest, on = degrees[name], []
        for tier in range(3):
            count = rest if tier == 2 else math.gcd(rest, free[tier])
            on.append(count)
            rest //= count
            # What does not divide a tier leaves the rest of it to nobody.
            free[tier] = max(1, free[tier] // count) if rest == 1 or tier == 2 else 1
        placed[name] = tuple(on)
    return placed


def plan_layout(plan: Plan, machine: Supernode) -> dict[str, On]:
    """Ranks of a plan's dimensions by tier, and of the replicas that share sequences."""
    degrees = {name: getattr(plan, name) for name in DIMENSIONS}
    placed = layout(plan.order, degrees, machine)
    if plan.context == 1:
        return {**placed, "context": (1, 1, 1)}
    inner = [
        part for name in plan.order
        for part in (("context", "replicas") if name == "data" else (name,))
    ]  # fmt: skip
    degrees |= {"context": plan.context, "replicas": plan.replicas}
    return {**placed, "context": layout(inner, degrees, machine)["context"]}


def shares(on: On, machine: Supernode) -> tuple[float, float, float]:
    """Of the bytes that a collective of N bytes moves, what a rank sends over each tier."""
    a, b, c = on
    ranks = a * b * c
    if machine.fabric.shared_ports:
        return (a - 1) / ranks, (a * b - a) / ranks, (ranks - a * b) / ranks
    whole = (ranks - 1) / ranks
    return whole * (a > 1), whole / a * (b > 1), whole / (a * b) * (c > 1)


def share_sizes(
    groups: Iterable[str], on: Mapping[str, On], machine: Supernode
) -> dict[str, float]:
    """What `on_any_links` left as symbols, where the groups lie on these tiers."""
    sizes = {}
    for group in groups:
        sizes |= zip(share_names(group), shares(on[group], machine), strict=True)
    return sizes


def reach(on: On) -> int:
    """The furthest tier of a group, as `Work.reach` numbers them; -1 for one rank."""
    return max((tier for tier in range(3) if on[tier] > 1), default=-1)


def on_any_links(program: Program, groups: Mapping[str, tuple[int, int]]) -> Program:
    """`program`, whose collectives lie on the tiers of `GROUPS`, with the bytes of every tier as
    symbols (`share_names`). Of every group of it: its ranks, and the tier that it waits for."""
    operations = []
    for op in program.operations:
        work = op.work
        if work.kind == "collective" and work.reach >= 0:
            group = next(name for name in groups if TIERS[work.reach] == GROUPS[name])
            ranks, furthest = groups[group]
            total = Size.of(getattr(work, f"{GROUPS[group]}_bytes")) * (ranks / (ranks - 1))
            fields = {
                f"{tier}_bytes": total * Size.symbol(share)
                for tier, share in zip(TIERS, share_names(group), strict=True)
            }
            work = dataclasses.replace(work, reach=furthest, **fields)
        loop = op.loop and dataclasses.replace(op.loop, body=on_any_links(op.loop.body, groups))
        operations.append(dataclasses.replace(op, work=work, loop=loop))
    return Program(tuple(operations), program.outputs, program.inputs)
