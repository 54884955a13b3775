"""Greedy replicate-and-pack, the method DeepSeek published as EPLB, for all layers at once.

1. Replicate: each redundant slot in turn goes to the expert with the largest load per copy. This
   minimises the largest load of a single copy.
2. Pack: copies in falling order of load, each onto the lightest rank that has room (longest
   processing time first, with bins of equal size).

Hierarchical where the router's groups divide over the nodes: groups are packed onto nodes first,
then the two steps run inside each node. It balances the mean of the windows; it knows nothing of
their spread. The published method may put two copies of an expert on one rank, where the second is
of no use; here an expert gets one copy a rank at most, and doubles are exchanged (`take_apart`).
"""

import numpy as np
from jaxtyping import Float, Int

from cmjax.placement.methods.once_per_rank import take_apart
from cmjax.placement.plan import EMPTY, count_copies
from cmjax.placement.problem import Plan, Problem


def greedy(problem: Problem) -> Plan:
    """Place by greedy replicate-and-pack on the mean load of the windows.

    As published: hierarchical where the router's groups divide over the nodes, else global.
    """
    fits = problem.groups % problem.nodes == 0
    groups, nodes = (problem.groups, problem.nodes) if fits else (1, 1)
    return greedy_on(problem, problem.loads.counts.mean(0), groups=groups, nodes=nodes)


def greedy_global(problem: Problem) -> Plan:
    """The global form, whatever the groups: one group, one node."""
    return greedy_on(problem, problem.loads.counts.mean(0))


def greedy_hierarchical(problem: Problem) -> Plan:
    """The hierarchical form. Where the groups do not divide over the nodes, every expert is a
    group of its own; where the experts do not either, the global form.
    """
    choices = (problem.groups, problem.experts)
    groups = next((count for count in choices if count % problem.nodes == 0), None)
    loads = problem.loads.counts.mean(0)
    if groups is None:
        return greedy_on(problem, loads)
    return greedy_on(problem, loads, groups=groups, nodes=problem.nodes)


def greedy_on(
    problem: Problem, loads: Float[np.ndarray, "layers experts"], *, groups: int = 1, nodes: int = 1
) -> Plan:
    """Replicate and pack any one load per expert, groups first packed onto nodes."""
    layers, _experts = loads.shape
    if problem.copies < problem.slots:
        groups, nodes = 1, 1  # whole nodes of uneven ranks do not divide

    by_node = _experts_by_node(loads, groups, nodes)
    node_loads = np.take_along_axis(loads, by_node, axis=1).reshape(layers * nodes, -1)
    fill, own = problem.copies // nodes, node_loads.shape[1]
    copied = replicate(node_loads, fill, max(problem.ranks // nodes, -(-fill // own)))
    copies = count_copies(copied, own)
    copy_loads = np.take_along_axis(node_loads / copies, copied, axis=1)
    room = ((0, 0), (0, problem.slots // nodes - fill))  # an empty slot is a copy without load
    slots = pack(np.pad(copy_loads, room), problem.ranks // nodes)

    local = np.take_along_axis(np.pad(copied, room), slots, axis=1)
    local = np.where(slots >= fill, EMPTY, local)
    local = take_apart(local, node_loads, problem.ranks // nodes, empty_too=problem.uneven)
    local = local.reshape(layers, nodes, -1)
    index = np.maximum(local, 0) + own * np.arange(nodes)[:, None]
    found = np.take_along_axis(by_node, index.reshape(layers, -1), axis=1)
    found = np.where(local.reshape(layers, -1) == EMPTY, EMPTY, found)
    # Copies that a node has no more ranks for go to others.
    return problem.plan(take_apart(found, loads, problem.ranks, empty_too=problem.uneven))


def replicate(
    loads: Float[np.ndarray, "rows experts"], slots: int, most: int | None = None
) -> Int[np.ndarray, "rows slots"]:
    """Fill `slots` slots with experts, each extra slot easing the largest load per copy.

    Args:
      loads: tokens of each expert.
      slots: slots to fill, at least one per expert.
      most: copies that an expert gets at most; None is any number.

    Returns: the expert of each slot: every expert once in order, then the extra copies in the order
      they were given. The result minimises the largest load per copy of each row.
    """
    rows, experts = loads.shape
    filled = np.empty((rows, slots), np.int64)
    filled[:, :experts] = np.arange(experts)
    copies = np.ones_like(loads)
    per_copy = loads.copy()
    row = np.arange(rows)
    for slot in range(experts, slots):
        hottest = per_copy.argmax(1)
        filled[:, slot] = hottest
        copies[row, hottest] += 1
        per_copy[row, hottest] = loads[row, hottest] / copies[row, hottest]
        if most is not None:
            per_copy[row, hottest] = np.where(
                copies[row, hottest] == most, -1.0, per_copy[row, hottest]
            )
    return filled


def cover(
    loads: Float[np.ndarray, "rows experts"], slots: int, share: Float[np.ndarray, "most"]
) -> Int[np.ndarray, "rows experts"]:
    """Copies that minimise the largest load of a copy, one of c copies having `share[c - 1]` of it.

    Args:
      loads: tokens of each expert.
      slots: copies in all, at least one per expert.
      share: by copies, 1 to the most that an expert gets; it does not rise.
    Returns: copies of every expert, as few as reach the least, what is left given to the largest
      load over copies.
    """
    most = np.append(share, 0.0)  # one more copy than can be had
    low, high = np.zeros(len(loads)), loads.max(1)

    def needed(limit):
        ratio = limit[:, None] / np.maximum(loads, 1e-300)
        return np.searchsorted(-most, -ratio * (1 + 1e-12)) + 1

    for _ in range(60):
        middle = (low + high) / 2
        fits = (needed(middle) <= len(share)).all(1) & (needed(middle).sum(1) <= slots)
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    copies = needed(high)
    row = np.arange(len(loads))
    while (left := copies.sum(1) < slots).any():
        hottest = np.where(copies < len(share), loads / copies, -1.0).argmax(1)
        copies[row, hottest] += left & (copies[row, hottest] < len(share))
        if (copies == len(share)).all(1).any():
            break
    return copies


def pack(loads: Float[np.ndarray, "rows items"], bins: int) -> Int[np.ndarray, "rows items"]:
    """Pack items into bins of equal size, heaviest first into the lightest bin with room.

    Returns: the item that takes each place, places of bin 0 first. With one place per bin the items
      stay in order.
    """
    rows, items = loads.shape
    size = items // bins
    if size == 1:
        return np.broadcast_to(np.arange(items), (rows, items)).copy()
    order = np.argsort(-loads, axis=1, kind="stable")
    sorted_loads = np.take_along_axis(loads, order, axis=1)
    places = np.empty((rows, items), np.int64)
    weight = np.zeros((rows, bins))
    filled = np.zeros((rows, bins), np.int64)
    row = np.arange(rows)
    for item in range(items):
        lightest = weight.argmin(1)
        place = filled[row, lightest]
        places[row, lightest * size + place] = order[:, item]
        filled[row, lightest] = place + 1
        # A full bin weighs infinitely much, so it is never the lightest.
        heavier = weight[row, lightest] + sorted_loads[:, item]
        weight[row, lightest] = np.where(place + 1 == size, np.inf, heavier)
    return places


def _experts_by_node(loads, groups, nodes):
    """Experts in the order of the nodes their groups are packed onto, [layers, experts]."""
    layers, experts = loads.shape
    size = experts // groups
    packed = pack(loads.reshape(layers, groups, size).sum(-1), nodes)
    return (packed[:, :, None] * size + np.arange(size)).reshape(layers, experts)
