"""From a relaxed placement to whole copies in whole slots, for many layers at once, in NumPy."""

import numpy as np
from jaxtyping import Float, Int

_BALANCE = 10.0  # a tenth of the mean load outweighs a full wish: wishes break near-ties
_SECOND_COPY = 1e3  # outweighs any wish and any load: only when no other rank has room


def round_copies(
    copies: Float[np.ndarray, "rows experts"], slots: int, most: int
) -> Int[np.ndarray, "rows experts"]:
    """Whole copies nearest to fractional ones by largest remainder.

    Args:
      copies: fractional copies, each at least 1, rows summing to about `slots`.
      slots: what every row of the result sums to.
      most: copies an expert gets at most (its ranks), as long as the slots can be filled so.
    """
    rows, experts = copies.shape
    most = max(most, -(-slots // experts))
    whole = np.clip(np.floor(copies).astype(np.int64), 1, most)
    row = np.arange(rows)
    for sign in (1, -1):
        missing = sign * (slots - whole.sum(-1))
        while (missing > 0).any():
            room = whole < most if sign > 0 else whole > 1
            wish = np.where(room, sign * (copies - whole), -np.inf)
            whole[row, wish.argmax(-1)] += sign * (missing > 0)
            missing -= missing > 0
    return whole


def round_places(
    wishes: Float[np.ndarray, "rows experts ranks"],
    copies: Int[np.ndarray, "rows experts"],
    loads: Float[np.ndarray, "rows experts"],
) -> Int[np.ndarray, "rows slots"]:
    """Put whole copies on ranks, heaviest first, each where it is wished for and the load is low.

    Args:
      wishes: fractional copies of each expert on each rank.
      copies: whole copies of each expert; every row sums to the same multiple of the ranks.
      loads: tokens of each expert.
    Returns: the expert of each slot, ranks in order. Copies of an expert share a rank only where
      no other rank has room.
    """
    rows, experts, ranks = wishes.shape
    slots = int(copies[0].sum())
    size = slots // ranks
    copied = np.repeat(np.tile(np.arange(experts), rows), copies.ravel()).reshape(rows, slots)
    per_copy = np.take_along_axis(loads / copies, copied, axis=1)
    order = np.argsort(-per_copy, axis=1, kind="stable")
    copied = np.take_along_axis(copied, order, axis=1)
    per_copy = np.take_along_axis(per_copy, order, axis=1) / (loads.sum(-1, keepdims=True) / ranks)

    row = np.arange(rows)
    wishes = np.array(wishes)
    weight = np.zeros((rows, ranks))
    filled = np.zeros((rows, ranks), np.int64)
    placed = np.empty((rows, slots), np.int64)
    for step in range(slots):
        expert = copied[:, step]
        score = wishes[row, expert] - _BALANCE * weight
        rank = np.where(filled < size, score, -np.inf).argmax(-1)
        placed[row, rank * size + filled[row, rank]] = expert
        filled[row, rank] += 1
        weight[row, rank] += per_copy[:, step]
        wishes[row, expert, rank] -= _SECOND_COPY
    return placed
