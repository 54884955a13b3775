"""How many ranks and nodes a token goes to, for kernels that send a token once to each.

A token that chose the experts E, each served by one copy drawn by its share, reaches node n with

    P[n] = 1 - product over e in E of (1 - share[e, n]),

so it reaches sum over n of P[n] nodes, mean over tokens; likewise for ranks. Where only counts are
known, `expected_reach` takes the experts of a token as chosen independently. Which ranks form a
node is free where all ranks cost the same: `group_ranks` exchanges whole ranks between nodes, which
leaves the balance as it is.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from cmjax.occupancy import reach_probability
from cmjax.placement.loads import Loads
from cmjax.placement.plan import EMPTY, Plan
from cmjax.placement.routes import Routes

_CHUNK = 2048  # tokens whose probabilities are held at once


@dataclass(frozen=True, eq=False)
class Reach:
    """Places that a token goes to, mean over tokens, by layer.

    Attributes:
      ranks: different ranks.
      nodes: different nodes.
    """

    ranks: Float[np.ndarray, "layers"]
    nodes: Float[np.ndarray, "layers"]

    def remote_nodes(self, nodes: int) -> float:
        """Nodes other than its own, mean over layers, tokens starting on every node alike."""
        return float(self.nodes.mean() * (1 - 1 / nodes))


def reach(plan: Plan, routes: Routes) -> Reach:
    """Expected ranks and nodes that tokens go to under `plan`; at most top-k each.

    Args:
      plan: the placement; tokens take a copy of their expert by its share.
      routes: experts of every token and layer.
    Raises: ValueError if plan and routes differ in layers or experts.
    """
    _check(plan, routes)
    by_rank = _by_rank(plan)
    by_node = by_rank.reshape(plan.layers, plan.experts, plan.nodes, -1).sum(-1)
    ranks, nodes = np.zeros(plan.layers), np.zeros(plan.layers)
    ids = routes.ids
    for total, shares in ((ranks, by_rank), (nodes, by_node)):
        missed = 1 - np.clip(shares, 0, 1)
        for layer in range(plan.layers):
            for start in range(0, len(ids), _CHUNK):
                chosen = ids[start : start + _CHUNK, layer]
                never = np.ones((len(chosen), shares.shape[-1]))
                for choice in chosen.T:
                    never *= missed[layer, choice]
                total[layer] += (1 - never).sum()
    return Reach(ranks / len(ids), nodes / len(ids))


def expected_reach(plan: Plan, loads: Loads, top_k: int) -> Reach:
    """Ranks and nodes that tokens go to if their `top_k` experts are independent draws.

    Each draw falls on a place with its share p of the layer's tokens, so a token reaches the sum
    over places of 1 - (1 - p)**top_k; mean over windows. Real tokens choose some experts together
    and reach fewer places where these meet.

    Raises: ValueError if plan and loads differ in layers or experts, or for top_k below 1.
    """
    if top_k < 1:
        raise ValueError(f"expected_reach: top_k must be at least 1, got {top_k}")
    tokens = plan.tokens_per_rank(loads.counts)
    by_node = tokens.reshape(*tokens.shape[:-1], plan.nodes, -1).sum(-1)
    ranks, nodes = (
        reach_probability(part / part.sum(-1, keepdims=True), top_k).sum(-1).mean(0)
        for part in (tokens, by_node)
    )
    return Reach(ranks, nodes)


def group_ranks(plan: Plan, routes: Routes) -> Plan:
    """`plan` with ranks exchanged between nodes so that experts chosen together share a node.

    Each step makes the exchange of two ranks of a layer that brings most pairs together, counted
    in the tokens that chose both, until none does. Tokens per rank are permuted, nothing else.
    Ranks that hold nothing stay.

    Raises: ValueError as `reach`.
    """
    _check(plan, routes)
    if plan.nodes == 1:
        return plan
    by_rank = _by_rank(plan)
    size = plan.ranks // plan.nodes
    home = np.arange(plan.ranks) // size
    order = np.tile(np.arange(plan.ranks), (plan.layers, 1))
    for layer in range(plan.layers):
        pairs = by_rank[layer].T @ _chosen_together(routes.ids[:, layer], plan.experts)
        pairs = pairs @ by_rank[layer]
        np.fill_diagonal(pairs, 0)
        pairs[~plan.alive] = 0
        _exchange(pairs, home, order[layer], plan.alive)
    slots = (order[..., None] * plan.slots_per_rank + np.arange(plan.slots_per_rank)).reshape(
        plan.layers, -1
    )
    split = None if plan.split is None else np.take_along_axis(plan.split, slots, axis=1)
    return replace(
        plan, expert_of_slot=np.take_along_axis(plan.expert_of_slot, slots, axis=1), split=split
    )


def _exchange(pairs, home, order, alive):
    """Exchange places in `order` while that raises the pairs inside nodes."""
    inside = home[:, None] == home
    other = ~inside & alive[:, None] & alive
    for _ in range(4 * len(order)):
        placed = pairs[np.ix_(order, order)]
        towards = np.stack([placed[:, home == node].sum(1) for node in range(home.max() + 1)], 1)
        here = towards[np.arange(len(order)), home]
        there = towards[:, home]
        gain = there + there.T - here[:, None] - here - 2 * placed
        gain = np.where(other, gain, -np.inf)
        best = np.unravel_index(gain.argmax(), gain.shape)
        if gain[best] <= 1e-9 * max(pairs.max(), 1e-30):
            return
        order[list(best)] = order[list(best[::-1])]


def _by_rank(plan) -> Float[np.ndarray, "layers experts ranks"]:
    shares = np.zeros((plan.layers, plan.experts + 1, plan.ranks))
    home = np.arange(plan.expert_of_slot.shape[1]) // plan.slots_per_rank
    held = np.where(plan.expert_of_slot == EMPTY, plan.experts, plan.expert_of_slot)
    np.add.at(shares, (np.arange(plan.layers)[:, None], held, home), plan.split_of_slot)
    return shares[:, :-1]


def _chosen_together(ids, experts) -> Float[np.ndarray, "experts experts"]:
    """Tokens that chose both of two different experts."""
    together = np.zeros((experts, experts))
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        chosen = np.zeros((len(part), experts))
        chosen[np.arange(len(part))[:, None], part] = 1
        together += chosen.T @ chosen
    np.fill_diagonal(together, 0)
    return together


def _check(plan, routes):
    if (plan.layers, plan.experts) != (routes.layers, routes.experts):
        raise ValueError(
            f"reach: the plan has {plan.layers} layers of {plan.experts} experts, "
            f"{routes.source} {routes.layers} of {routes.experts}"
        )
