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
from collections.abc import Mapping, Sequence

from cmjax.hardware import TIERS, Supernode
from cmjax.parallelism.plan import DIMENSIONS, Plan
from cmjax.program import Program, Size

SHARES = tuple(f"{tier}_share" for tier in TIERS)
"""Symbols of a program whose collectives may lie on any tiers."""


def layout(
    order: Sequence[str], degrees: Mapping[str, int], machine: Supernode
) -> dict[str, tuple[int, int, int]]:
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


def plan_layout(plan: Plan, machine: Supernode) -> dict[str, tuple[int, int, int]]:
    """Ranks of a plan's dimensions by tier."""
    return layout(plan.order, {name: getattr(plan, name) for name in DIMENSIONS}, machine)


def shares(on: tuple[int, int, int], machine: Supernode) -> tuple[float, float, float]:
    """Of the bytes that a collective of N bytes moves, what a rank sends over each tier."""
    a, b, c = on
    ranks = a * b * c
    if machine.fabric.shared_ports:
        return (a - 1) / ranks, (a * b - a) / ranks, (ranks - a * b) / ranks
    whole = (ranks - 1) / ranks
    return whole * (a > 1), whole / a * (b > 1), whole / (a * b) * (c > 1)


def reach(on: tuple[int, int, int]) -> int:
    """The furthest tier of a group, as `Work.reach` numbers them; -1 for one rank."""
    return max((tier for tier in range(3) if on[tier] > 1), default=-1)


def on_any_links(program: Program, ranks: int, furthest: int) -> Program:
    """`program`, whose collectives lie on the tier `node` with `ranks` ranks, with the bytes of
    every tier as symbols (`SHARES`), waiting for the tier `furthest`."""
    operations = []
    for op in program.operations:
        work = op.work
        if work.kind == "collective" and work.reach >= 0:
            total = Size.of(work.node_bytes) * (ranks / (ranks - 1))
            fields = {
                f"{tier}_bytes": total * Size.symbol(share)
                for tier, share in zip(TIERS, SHARES, strict=True)
            }
            work = dataclasses.replace(work, reach=furthest, **fields)
        loop = op.loop and dataclasses.replace(
            op.loop, body=on_any_links(op.loop.body, ranks, furthest)
        )
        operations.append(dataclasses.replace(op, work=work, loop=loop))
    return Program(tuple(operations), program.outputs, program.inputs)
