"""From one placement to the next: which expert weights move from which rank, and for how long.

Ranks are alike, so the ranks of a new plan may be renamed, and slots of a rank reordered, until the
most weights stay where they are (an assignment problem, Kuhn 1955). Layers move one after the other
and every rank sends and receives at once, so

    wire_s = sum over layers of  max over ranks of  max(sent, received) bytes / bandwidth of tier.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Int

from cmjax.hardware import Supernode
from cmjax.placement.plan import EMPTY, Plan

_DIE, _NODE, _SUPERNODE = range(3)


class Transfer(NamedTuple):
    """One expert's weights of one layer, sent from a rank that holds them to one that will.

    `source` is `target` where a rank gets a second copy of what it holds: nothing crosses a link.
    """

    layer: int
    expert: int
    source: int
    target: int
    bytes: float


def match(current: Plan, proposed: Plan) -> Plan:
    """`proposed` with ranks renamed and slots reordered so that the fewest weights move.

    Nodes stay together: whole nodes are renamed, and ranks inside them. A rank that holds nothing
    in any layer of `proposed` may be dead and keeps its place. The tokens per rank are those of
    `proposed` in another order, so any price that does not tell ranks apart is unchanged.

    Raises: ValueError if the plans differ in layers, experts, slots, ranks or nodes.
    """
    _check_alike("match", current, proposed)
    order = np.empty(current.expert_of_slot.shape, np.int64)
    shape = (current.ranks, current.slots_per_rank)
    dead = np.flatnonzero(~proposed.alive)
    for layer in range(current.layers):
        old = current.expert_of_slot[layer].reshape(shape)
        new = proposed.expert_of_slot[layer].reshape(shape)
        shared = _shared(new, old, current.experts)
        shared[dead, dead] = shared.sum() + 1  # no other renaming is worth as much
        renamed = _rename(shared, current.nodes)
        kept = [rank * shape[1] + _reorder(new[rank], old[n]) for n, rank in enumerate(renamed)]
        order[layer] = np.concatenate(kept)
    moved = {"expert_of_slot": np.take_along_axis(proposed.expert_of_slot, order, axis=1)}
    if proposed.split is not None:
        moved["split"] = np.take_along_axis(proposed.split, order, axis=1)
    return dataclasses.replace(proposed, **moved)


def transfers(
    current: Plan,
    proposed: Plan,
    machine: Supernode,
    *,
    expert_bytes: float,
) -> tuple[Transfer, ...]:
    """What has to be sent to get from `current` to `proposed`, slot for slot.

    A weight comes from the nearest rank that holds it: of the same NPU, else of the same node; of
    several as near, from the one that has sent least so far. To empty a slot moves nothing.

    Args:
      current, proposed: plans of one shape; `match` makes them few.
      machine: says which ranks are near.
      expert_bytes: weights of one expert in one layer.
    Raises: ValueError if the plans differ in shape, or `expert_bytes` is not positive.
    """
    _check_alike("transfers", current, proposed)
    if not expert_bytes > 0:
        raise ValueError(f"transfers: expert_bytes must be positive, got {expert_bytes}")
    found = []
    for layer in np.flatnonzero((current.expert_of_slot != proposed.expert_of_slot).any(-1)):
        old, new = current.expert_of_slot[layer], proposed.expert_of_slot[layer]
        sent = np.zeros(current.ranks, np.int64)
        for slot in np.flatnonzero((old != new) & (new != EMPTY)):
            target, expert = slot // current.slots_per_rank, new[slot]
            holders = np.unique(np.flatnonzero(old == expert) // current.slots_per_rank)
            far = _tier(holders, target, current, machine)
            source = holders[np.lexsort((sent[holders], far))[0]]
            sent[source] += 1
            found.append(
                Transfer(int(layer), int(expert), int(source), int(target), float(expert_bytes))
            )
    return tuple(found)


def wire_s(
    moved: Sequence[Transfer], plan: Plan, machine: Supernode
) -> Float[np.ndarray, "layers"]:
    """Seconds for which each layer's weights are on the links.

    Weights come from and go to HBM, so the links reach `exchange.bandwidth_from_hbm` of their
    point-to-point bandwidth. Where tiers share their ports the bytes of node and supernode add.

    Args:
      moved: what is sent.
      plan: of either side; says layers, ranks and nodes.
      machine: bandwidths and latencies of the tiers.
    """
    seconds = np.zeros(plan.layers)
    if not moved:
        return seconds
    layer, _, source, target, size = (np.array(column) for column in zip(*moved, strict=True))
    tier = _tier(source, target, plan, machine)
    tiers = [getattr(machine.fabric, name) for name in ("die", "node", "supernode")]
    rate = np.array([float(t.bandwidth_bytes_per_s) for t in tiers])
    latency = np.array([float(t.latency_s) for t in tiers])
    across = source != target
    busy = np.zeros((2, 3, plan.layers, plan.ranks))
    for side, rank in enumerate((source, target)):
        np.add.at(busy[side], (tier[across], layer[across], rank[across]),
                  size[across] / rate[tier[across]])  # fmt: skip
    near, node, far = busy[:, _DIE], busy[:, _NODE], busy[:, _SUPERNODE]
    apart = node + far if machine.fabric.shared_ports else np.maximum(node, far)
    longest = np.maximum(near, apart).max((0, -1))  # over sides and ranks
    wait = np.zeros(plan.layers)
    np.maximum.at(wait, layer[across], latency[tier[across]])
    return longest / float(machine.exchange.bandwidth_from_hbm) + wait


def _tier(source, target, plan, machine):
    """0 on one NPU (or one rank), 1 in one node, 2 between nodes."""
    per_node = machine.npus_per_node * machine.dies_per_npu
    if plan.nodes > 1:
        per_node = plan.ranks // plan.nodes
    same_npu = source // machine.dies_per_npu == target // machine.dies_per_npu
    same_node = source // per_node == target // per_node
    return np.where(same_node, np.where(same_npu, _DIE, _NODE), _SUPERNODE)


def _shared(new, old, experts) -> Int[np.ndarray, "ranks ranks"]:
    """How many experts rank a of `new` and rank b of `old` have in common, copies counted."""
    held = []
    for slots in (new, old):
        counts = np.zeros((len(slots), experts + 1), np.int64)  # the last column: empty slots
        np.add.at(counts, (np.arange(len(slots))[:, None], slots), 1)
        held.append(counts[:, :-1])
    most = int(min(held[0].max(), held[1].max()))
    levels = range(1, most + 1)
    common = sum((held[0] >= n).astype(np.float32) @ (held[1] >= n).T.astype(np.float32)
                 for n in levels)  # fmt: skip
    return np.asarray(common, np.int64)


def _rename(shared, nodes) -> Int[np.ndarray, "ranks"]:
    """Which rank of the new plan goes to each place, nodes kept together."""
    # In a tie a rank stays where it is; the bonus of all ranks together is less than one weight.
    value = shared + np.eye(len(shared)) / (len(shared) + 1)
    size = len(shared) // nodes
    if nodes == 1:
        new, old = scipy.optimize.linear_sum_assignment(value, maximize=True)
        return new[np.argsort(old)]
    blocks = value.reshape(nodes, size, nodes, size).swapaxes(1, 2)
    inner = np.empty((nodes, nodes, size), np.int64)
    total = np.empty((nodes, nodes))
    for a, b in np.ndindex(nodes, nodes):
        new, old = scipy.optimize.linear_sum_assignment(blocks[a, b], maximize=True)
        inner[a, b] = new[np.argsort(old)]
        total[a, b] = blocks[a, b][new, old].sum()
    new, old = scipy.optimize.linear_sum_assignment(total, maximize=True)
    places = np.empty((nodes, size), np.int64)
    for a, b in zip(new, old, strict=True):
        places[b] = a * size + inner[a, b]
    return places.ravel()


def _reorder(new, old):
    """An order of the slots of `new` in which what `old` holds too keeps its slot."""
    waiting = list(range(len(new)))
    order = np.full(len(old), -1)
    for slot, expert in enumerate(old):
        place = next((n for n in waiting if new[n] == expert), None)
        if place is not None:
            order[slot] = place
            waiting.remove(place)
    order[order < 0] = waiting
    return order


def _check_alike(function, current, proposed):
    for name in ("layers", "experts", "ranks", "nodes", "slots_per_rank"):
        one, two = getattr(current, name), getattr(proposed, name)
        if one != two:
            raise ValueError(f"{function}: the plans differ in {name}: {one} and {two}")
