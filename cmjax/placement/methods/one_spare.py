"""OmniPlacement's static rule: one spare slot per die, and no expert twice on a die.

Restated from the static planner of omni-infer (github.com/omni-ai-npu/omni-infer): copies are given
one by one to the expert with the largest load per copy, as in `greedy`, at most `MOST_COPIES` each
and only as many as one spare slot per rank allows; then they are packed heaviest first onto the
lightest rank that has room and does not hold the expert yet. Slots beyond the spare one stay empty.
Its choice of which layers get the spare slot is the problem's `slots_by_layer`.
"""

import numpy as np
from jaxtyping import Float, Int

from cmjax.placement.methods.greedy import replicate
from cmjax.placement.plan import EMPTY, count_copies
from cmjax.placement.problem import Plan, Problem

MOST_COPIES = 12
"""As in the plans Huawei published for DeepSeek-V3 (`epmaxdeploy_12`)."""


def one_spare(problem: Problem) -> Plan:
    """Place by OmniPlacement's rule on the mean load of the windows."""
    loads = problem.loads.counts.mean(0)
    layers, experts = loads.shape
    ranks = problem.ranks
    size = min(problem.slots_per_rank, -(-experts // ranks) + 1)
    most = min(MOST_COPIES, ranks)
    slots = min(size * ranks, experts * most, problem.copies)
    copied = replicate(loads, slots, most)
    copies = count_copies(copied, experts)
    placed = np.full((layers, ranks, problem.slots_per_rank), EMPTY)
    placed[..., :size] = _pack_once(loads / copies, copied, ranks, size)
    return problem.plan(placed.reshape(layers, -1))


def _pack_once(
    per_copy: Float[np.ndarray, "layers experts"],
    copied: Int[np.ndarray, "layers slots"],
    ranks: int,
    size: int,
) -> Int[np.ndarray, "layers ranks size"]:
    layers, slots = copied.shape
    weight = np.take_along_axis(per_copy, copied, axis=1)
    # Copies of an expert weigh the same; ordered by number too, they follow one another.
    order = np.lexsort((copied, -weight), axis=1)
    row = np.arange(layers)
    placed = np.full((layers, ranks, size), EMPTY)
    filled = np.zeros((layers, ranks), np.int64)
    total = np.zeros((layers, ranks))
    held = np.zeros((layers, ranks, per_copy.shape[1]), bool)
    for step in range(slots):
        expert = copied[row, order[:, step]]
        closed = (filled == size) | held[row, :, expert]
        stuck = np.flatnonzero(closed.all(1))
        for layer in stuck:
            _make_room(placed[layer], filled[layer], total[layer], held[layer], per_copy[layer],
                       expert[layer])  # fmt: skip
        closed = (filled == size) | held[row, :, expert]
        rank = np.where(closed, np.inf, total).argmin(1)
        placed[row, rank, filled[row, rank]] = expert
        filled[row, rank] += 1
        total[row, rank] += weight[row, order[:, step]]
        held[row, rank, expert] = True
    return placed


def _make_room(placed, filled, total, held, per_copy, expert):
    """One layer: every rank with room holds `expert`; move something there from one that does not.

    A full rank without the expert holds something that the rank with room does not, as both are
    sets and the full one is larger; the lightest full rank gives its lightest such expert.
    """
    room = np.where(filled < placed.shape[1], total, np.inf).argmin()
    donor = np.where(held[:, expert], np.inf, total).argmin()
    loose = np.array([e for e in placed[donor] if not held[room, e]])
    moved = loose[per_copy[loose].argmin()]
    spot = np.flatnonzero(placed[donor] == moved)[0]
    placed[donor, spot] = placed[donor, filled[donor] - 1]
    placed[donor, filled[donor] - 1] = EMPTY
    placed[room, filled[room]] = moved
    filled[[donor, room]] += [-1, 1]
    total[[donor, room]] += per_copy[moved] * np.array([-1, 1])
    held[[donor, room], moved] = [False, True]
