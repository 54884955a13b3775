"""Bytes that a placement sends between nodes, expected from counts.

With sources spread evenly over the ranks, a share 1 - 1 / nodes of a node's tokens comes from other
nodes, whatever the placement, if every copy of a token is sent for itself. A kernel that sends a
token once to a node, or once to a rank, sends less the more a token's experts share one: that
depends on which experts are chosen together, so it needs routes (`multicast`).
"""

import numpy as np
from jaxtyping import Float


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
