"""Whole copies on whole ranks: from fractional ones, or from loads alone.

Copies are rounded by largest remainder. They are then placed heaviest first (longest processing
time first), on the rank with room that is lightest with the copy on it in *all* windows,

    argmin over ranks r of  max over windows w of  x[w, r] + a[w, e]  -  ε · wish[e, r],

so experts that are hot at different times share a rank, which packing any one load per expert, as
`greedy` does, cannot see. Wishes, of a relaxed plan say, settle what is nearly a tie. Copies may be
kept on different nodes, for engines that send tokens to the nearest one.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_DOUBLE = 1e4  # outweighs any load: a second copy on a rank only when no other has room
_SAME_NODE = 1e2  # likewise, of copies on one node


def round_copies(
    copies: Float[np.ndarray, "rows experts"], slots: int, most: int
) -> Int[np.ndarray, "rows experts"]:
    """Whole copies nearest to fractional ones.

    Args:
      copies: fractional copies, each at least 1, rows that sum to about `slots`.
      slots: what every row of the result sums to, at least one per expert.
      most: copies an expert gets at most, as long as the slots can be filled so.
    """
    most = max(most, -(-slots // copies.shape[1]))
    whole = np.clip(np.floor(copies).astype(np.int64), 1, most)
    row = np.arange(len(copies))
    for sign in (1, -1):
        missing = sign * (slots - whole.sum(-1))
        while (missing > 0).any():
            room = whole < most if sign > 0 else whole > 1
            wish = np.where(room, sign * (copies - whole), -np.inf)
            whole[row, wish.argmax(-1)] += sign * (missing > 0)
            missing -= missing > 0
    return whole


def round_places(
    copies: Int[np.ndarray, "rows experts"],
    loads: Float[np.ndarray, "rows windows experts"],
    ranks: int,
    wishes: Float[Array, "rows experts ranks"] | None = None,
    *,
    wish: float = 0.01,
    apart: int = 1,
) -> Int[np.ndarray, "rows slots"]:
    """The expert of each slot, ranks in order; every rank gets equally many slots.

    Args:
      copies: whole copies, the same multiple of `ranks` in every row.
      loads: tokens of each expert over the mean tokens of a rank.
      ranks: ranks to place on.
      wishes: fractional copies of each expert on each rank; None is no wish.
      wish: ε, what a full wish outweighs, in units of a rank's mean tokens.
      apart: nodes that the copies of an expert are spread over first.
    """
    rows, experts = copies.shape
    slots = int(copies[0].sum())
    per_copy = loads / copies[:, None]
    copied = np.repeat(np.tile(np.arange(experts), rows), copies.ravel()).reshape(rows, slots)
    weight = np.take_along_axis(per_copy.max(1), copied, axis=1)
    copied = np.take_along_axis(copied, np.argsort(-weight, axis=1, kind="stable"), axis=1)
    if wishes is None:
        wishes = jnp.zeros((rows, experts, 1))
    rank = _pack(
        jnp.asarray(copied), jnp.asarray(per_copy, jnp.float32), wish * wishes,
        ranks=ranks, apart=apart,
    )  # fmt: skip
    # A stable sort by rank keeps the heaviest first on each.
    return np.take_along_axis(copied, np.argsort(np.asarray(rank), axis=1, kind="stable"), axis=1)


@partial(jax.jit, static_argnames=("ranks", "apart"))
def _pack(copied, per_copy, wishes, *, ranks, apart):
    """Rank of each copy, in the order given: copied [rows, slots]."""

    def one(copied, per_copy, wishes):
        def step(carry, expert):
            tokens, room, held = carry
            new = tokens + per_copy[:, expert]  # [ranks, windows]
            score = new.max(-1) - wishes[expert] + _DOUBLE * held[expert]
            if apart > 1:
                near = held[expert].reshape(apart, -1).sum(-1)
                score += _SAME_NODE * jnp.repeat(near, ranks // apart)
            rank = jnp.where(room > 0, score, jnp.inf).argmin()
            held = held.at[expert, rank].set(True)
            return (tokens.at[rank].set(new[rank]), room.at[rank].add(-1), held), rank

        windows, experts = per_copy.shape
        start = (
            jnp.zeros((ranks, windows)),
            jnp.full(ranks, len(copied) // ranks),
            jnp.zeros((experts, ranks), bool),
        )
        return jax.lax.scan(step, start, copied)[1]

    return jax.vmap(one)(copied, per_copy, wishes)
