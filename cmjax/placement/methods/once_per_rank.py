"""Plans in which no rank holds an expert twice: a second copy there is a wasted slot, and engines
address one.

A second copy on a rank changes places with a slot of another rank, the one that leaves the busier
of the two ranks with the fewest tokens:

    min over slots j of  max(tokens[r] - w[i] + w[j], tokens[rank of j] + w[i] - w[j])

where w is the load of a slot. Each exchange removes one double and makes none.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from cmjax.placement.loads import Loads
from cmjax.placement.plan import EMPTY, Plan, count_copies


def once_per_rank(plan: Plan, loads: Loads) -> Plan:
    """`plan` with as few slots exchanged as it has doubles; itself if it has none.

    Args:
      plan: without empty slots and without shares per slot.
      loads: what balance is kept for: the mean of the windows.
    Raises: ValueError if an expert has more copies than there are ranks, slots are empty, or the
      plan has shares per slot.
    """
    if plan.split is not None or (plan.expert_of_slot == EMPTY).any():
        raise ValueError(
            "once_per_rank: expected a plan without empty slots and without shares per slot"
        )
    over = np.argwhere(plan.copies > plan.ranks)
    if len(over):
        layer, expert = over[0]
        raise ValueError(
            f"once_per_rank: expert {expert} of layer {layer} has {plan.copies[layer, expert]} "
            f"copies for {plan.ranks} ranks"
        )
    found = take_apart(plan.expert_of_slot, loads.counts.mean(0), plan.ranks)
    return replace(plan, expert_of_slot=found)


def take_apart(
    expert_of_slot: Int[np.ndarray, "layers slots"],
    loads: Float[np.ndarray, "layers experts"],
    ranks: int,
    *,
    empty_too: bool = False,
) -> Int[np.ndarray, "layers slots"]:
    """Slots exchanged until no rank holds an expert twice, as far as its copies allow.

    Args:
      expert_of_slot: slots of rank 0 first; -1 is an empty one.
      loads: what balance is kept for, tokens split evenly over copies.
      ranks: that the slots divide over.
      empty_too: whether a rank may have one empty slot at most.
    """
    layers, _slots = expert_of_slot.shape
    experts = loads.shape[1]
    held = np.where(expert_of_slot == EMPTY, experts, expert_of_slot)
    ordered = np.sort(held.reshape(layers, ranks, -1), axis=-1)
    same = ordered[..., 1:] == ordered[..., :-1]
    if not empty_too:
        same &= ordered[..., 1:] != experts
    found = np.array(expert_of_slot)
    for layer in np.flatnonzero(same.any((1, 2))):
        copies = np.maximum(count_copies(held[layer], experts + 1), 1)
        per_slot = (np.append(loads[layer], 0.0) / copies)[held[layer]]
        row = _exchange(held[layer], per_slot, ranks, experts + empty_too)
        found[layer] = np.where(row == experts, EMPTY, row)
    return found


def _exchange(row, weight, ranks, kinds):
    """One layer: what is numbered below `kinds` is held once by a rank."""
    row, weight = row.copy(), weight.copy()
    home = np.arange(len(row)) // (len(row) // ranks)
    total = np.bincount(home, weight, ranks)
    held = np.zeros((ranks, max(kinds, row.max() + 1)), np.int64)
    np.add.at(held, (home, row), 1)
    once = np.arange(held.shape[1]) < kinds
    moved = True
    while moved:
        moved = False
        for rank, expert in np.argwhere((held > 1) & once):
            while held[rank, expert] > 1:
                slot = np.flatnonzero((home == rank) & (row == expert))[-1]
                allowed = (held[home, expert] == 0) & ((held[rank, row] == 0) | ~once[row])
                if not allowed.any():
                    break  # another exchange may make room
                gain = weight - weight[slot]
                busier = np.maximum(total[rank] + gain, total[home] - gain)
                other = np.where(allowed, busier, np.inf).argmin()
                held[[rank, rank, home[other], home[other]],
                     [expert, row[other], expert, row[other]]] += [-1, 1, 1, -1]  # fmt: skip
                total[[rank, home[other]]] += gain[other] * np.array([1, -1])
                row[[slot, other]] = row[[other, slot]]
                weight[[slot, other]] = weight[[other, slot]]
                moved = True
    return row
