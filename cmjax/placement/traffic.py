"""Bytes that a placement sends between nodes, expected from counts or counted from routes.

With sources spread evenly over the ranks, a share 1 - 1 / nodes of a node's tokens comes from other
nodes, whatever the placement, if every copy of a token is sent for itself. A kernel that sends a
token once to a node, or once to a rank, sends less the more a token's experts share one: that
depends on which experts are chosen together, so it needs routes.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cmjax.placement.problem import Plan
from cmjax.placement.routes import Routes

_CHUNK = 8192  # tokens looked at together


def node_bytes(
    tokens: Float[np.ndarray, "*batch ranks"], nodes: int, payload_bytes: float
) -> Float[np.ndarray, "*batch nodes"]:
    """Expected bytes that each node receives from other nodes, every copy sent for itself.

    Args:
      tokens: rows that each rank receives (`Plan.tokens_per_rank`), ranks of node 0 first.
      nodes: nodes the ranks are spread over; every rank sends equally many rows.
      payload_bytes: of one row, dispatched and combined.
    Raises: ValueError if the ranks do not divide over the nodes.
    """
    tokens = np.asarray(tokens, float)
    if nodes < 1 or tokens.shape[-1] % nodes:
        raise ValueError(f"node_bytes: {tokens.shape[-1]} ranks do not divide over {nodes} nodes")
    arriving = tokens.reshape(*tokens.shape[:-1], nodes, -1).sum(-1)
    return arriving * (1 - 1 / nodes) * payload_bytes


@dataclass(frozen=True, eq=False)
class Reach:
    """How many places a token is sent to, mean over tokens, by layer; at most top-k each.

    Attributes:
      ranks: different ranks that hold one of the token's experts.
      nodes: different nodes.
    """

    ranks: Float[np.ndarray, "layers"]
    nodes: Float[np.ndarray, "layers"]


def reach(plan: Plan, routes: Routes) -> Reach:
    """Count the ranks and nodes that the tokens of `routes` go to under `plan`.

    Tokens take the copies of an expert in turn, which is an even split.

    Raises: ValueError if plan and routes differ in layers or experts.
    """
    if (plan.layers, plan.expert_count) != (routes.layers, routes.experts):
        raise ValueError(
            f"reach: the plan has {plan.layers} layers of {plan.expert_count} experts, "
            f"{routes.source} {routes.layers} of {routes.experts}"
        )
    ranks, nodes = np.zeros(plan.layers), np.zeros(plan.layers)
    per_node = plan.ranks // plan.nodes
    for layer, row in enumerate(plan.experts):
        order = np.argsort(row, kind="stable")  # slots by expert
        first = np.searchsorted(row[order], np.arange(plan.expert_count))
        for start in range(0, routes.tokens, _CHUNK):
            ids = routes.ids[start : start + _CHUNK, layer].astype(np.int64)
            turn = (start + np.arange(len(ids)))[:, None] % plan.copies[layer][ids]
            rank = order[first[ids] + turn] // plan.slots_per_rank
            ranks[layer] += _distinct(rank)
            nodes[layer] += _distinct(rank // per_node)
    return Reach(ranks / routes.tokens, nodes / routes.tokens)


def _distinct(places) -> int:
    """Different places per row, summed over rows."""
    ordered = np.sort(places, axis=1)
    return len(places) + int((ordered[:, 1:] != ordered[:, :-1]).sum())
