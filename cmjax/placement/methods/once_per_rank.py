"""Plans in which no rank holds an expert twice, which some engines cannot address.

A second copy on a rank changes places with a slot of another rank, the one that leaves the busier
of the two ranks with the fewest tokens:

    min over slots j of  max(tokens[r] - w[i] + w[j], tokens[rank of j] + w[i] - w[j])

where w is the load of a slot. Each exchange removes one double and makes none.
"""

from dataclasses import replace

import numpy as np

from cmjax.placement.loads import Loads
from cmjax.placement.plan import EMPTY, Plan


def once_per_rank(plan: Plan, loads: Loads) -> Plan:
    """`plan` with as few slots exchanged as it has doubles; itself if it has none.

    Args:
      plan: without empty slots, every expert split evenly over its copies.
      loads: what balance is kept for: the mean of the windows.
    Raises: ValueError if an expert has more copies than there are ranks, no exchange helps, slots
      are empty, or the plan has shares per slot.
    """
    if plan.split is not None or (plan.expert_of_slot == EMPTY).any():
        raise ValueError(
            "once_per_rank: expected a plan without empty slots and without shares per slot"
        )
    counts = loads.counts.mean(0)
    tokens = plan.tokens_per_rank(counts)
    per_slot = np.take_along_axis(counts / plan.copies, plan.expert_of_slot, axis=1)
    experts = np.array(plan.expert_of_slot)
    home = np.arange(experts.shape[1]) // plan.slots_per_rank
    for layer in range(plan.layers):
        row, weight, total = experts[layer], per_slot[layer], tokens[layer]
        held = np.zeros((plan.ranks, plan.experts), np.int64)
        np.add.at(held, (home, row), 1)
        for rank, expert in np.argwhere(held > 1):
            while held[rank, expert] > 1:
                slot = np.flatnonzero((home == rank) & (row == expert))[-1]
                allowed = (held[home, expert] == 0) & (held[rank, row] == 0)
                if not allowed.any():
                    raise ValueError(
                        f"once_per_rank: expert {expert} of layer {layer} has "
                        f"{plan.copies[layer, expert]} copies for {plan.ranks} ranks, and none can "
                        f"leave rank {rank}"
                    )
                gain = weight - weight[slot]
                busier = np.maximum(total[rank] + gain, total[home] - gain)
                other = np.where(allowed, busier, np.inf).argmin()
                held[[rank, rank, home[other], home[other]],
                     [expert, row[other], expert, row[other]]] += [-1, 1, 1, -1]  # fmt: skip
                total[[rank, home[other]]] += gain[other] * np.array([1, -1])
                row[[slot, other]] = row[[other, slot]]
                weight[[slot, other]] = weight[[other, slot]]
    return replace(plan, expert_of_slot=experts)
