"""Collectives: what a rank sends to peers on every tier of the fabric."""

from collections.abc import Mapping
from typing import Any

from cmjax.program.rules.registry import cost_rule
from cmjax.program.size import Size
from cmjax.program.tiers import tier_shares
from cmjax.program.work import Operand, Work


def exchange(nbytes: Size, names, mesh: Mapping[str, int]) -> dict:
    """Traffic fields when a rank sends 1/ranks of `nbytes` to every rank of the group, direct."""
    ranks, die, node, supernode = tier_shares(names, mesh)
    reach = 2 if supernode else 1 if node else 0 if die else -1
    return {
        "die_bytes": nbytes * die,
        "node_bytes": nbytes * node,
        "supernode_bytes": nbytes * supernode,
        "reach": reach,
        "ranks": int(ranks),
        "launches": 1.0 if ranks > 1 else 0.0,
    }


@cost_rule("all_to_all")
def _all_to_all(x: Operand, *, out, mesh, axis_name, **_) -> Work:
    """Each rank keeps 1/ranks of its array and sends the rest, one share to each peer."""
    return Work(kind="collective", **exchange(x.nbytes, axis_name, mesh))


@cost_rule("ragged_all_to_all")
def _ragged_all_to_all(x: Operand, *_: Operand, out, mesh, axis_name, **__) -> Work:
    """As an all-to-all of all rows of the operand, evenly spread over the ranks."""
    return Work(kind="collective", **exchange(x.nbytes, axis_name, mesh))


@cost_rule("all_gather", "all_gather_invariant")
def _all_gather(x: Operand, *, out, mesh, axis_name, **_) -> Work:
    """Each rank sends its whole shard to every peer (full mesh)."""
    return Work(kind="collective", **exchange(out[0].nbytes, axis_name, mesh))


@cost_rule("reduce_scatter")
def _reduce_scatter(x: Operand, *, out, mesh, axis_name, **_) -> Work:
    """Each rank sends 1/ranks of its array to every peer, which adds what it receives."""
    return Work(
        kind="collective",
        vector_bytes=x.nbytes,
        flops=x.size * (2.0 if x.is_complex else 1.0),
        **exchange(x.nbytes, axis_name, mesh),
    )


@cost_rule("psum", "psum2", "psum_invariant", "pmax", "pmin")
def _all_reduce(*xs: Operand, out, mesh, axes, **_) -> Work:
    """Reduce-scatter, then all-gather."""
    names = tuple(a for a in axes if isinstance(a, str))
    nbytes = sum((x.nbytes for x in xs), Size())
    size = sum((x.size * (2.0 if x.is_complex else 1.0) for x in xs), Size())
    return Work(
        kind="collective",
        vector_bytes=nbytes,
        flops=size,
        **exchange(nbytes * 2.0, names, mesh),
    )


@cost_rule("ppermute")
def _ppermute(x: Operand, *, out, mesh, axis_name, **_) -> Work:
    """Each rank sends its array to one peer; charged on the furthest tier of the axis."""
    _, _, node, supernode = tier_shares(axis_name, mesh)
    tier = "supernode" if supernode else "node" if node else "die"
    reach = {"die": 0, "node": 1, "supernode": 2}[tier]
    moved: dict[str, Any] = {f"{tier}_bytes": x.nbytes}
    return Work(kind="collective", reach=reach, **moved)
