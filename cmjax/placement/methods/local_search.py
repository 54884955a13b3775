"""Exact local search over whole plans, all layers and starting plans in one compiled program.

What is lowered is a penalty for every rank above a level that follows the slowest one
(the quadratic penalty method for a minimax problem; Bertsekas, Nonlinear Programming, chapter 4):

    Φ = sum over windows w and ranks r of  u[w] · max(x[w, r] - T[w], 0)²,
    T[w] = 1 + θ · (aim[w] - 1),    u[w] = 1 / ((1 - θ) · (aim[w] - 1)),
    aim[w] = top[w] + slack[w] / layers,

with x the tokens of a rank, in ordinary ones, over what every rank has where all are equally busy
(the mean, unless ranks cost unequally), and top[w] the slowest rank's in the best plan of the layer
so far. The objective is one of the sum of top[w] over layers: slack[w] is how much larger it may
grow before window w joins the objective's tail (all windows for the mean, the slowest alone for the
worst), and 0 within. So a window of the tail weighs the same however slow it is, and the others
count only where they would join it.

Unlike the maximum itself, Φ tells a step towards a better plan from a step nowhere, and a swap of
two experts changes only two of its terms per window. With θ = 0 everything is evened out, towards
1 the slowest rank is all that counts.

The best of the moves tried is made if it raises Φ by less than an exponential number of mean τ
times the largest aim[w] - 1: Metropolis' rule, by which the search leaves plans that no single
move improves (Kirkpatrick et al., "Optimization by simulated annealing", Science 1983).

Moves, all evaluated exactly, with copies of an expert sharing its tokens evenly or as the engine's
rule has it (`Routing`), by which a move changes the shares of all copies of both experts:

    swap       a slot on a hot rank and a slot elsewhere change experts
    overwrite  a slot gives up its expert (which has other copies), or was empty, and holds another

The hot rank is drawn in proportion to its share of Φ. A move that would put two copies of an expert
on a rank is left out.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmjax.placement.routing import Routing

_EPS = 1e-6
_ROUTED = 4  # of so many candidates one is tried where shares have to be found by rule


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchState:
    """Plans in work; leading axis `rows` is layers times starting plans.

    Attributes:
      expert_of_slot: the number of experts itself stands for an empty slot.
      copies: copies of every expert; 1 for the empty one, whose load is zero.
      tokens: x, by window and rank.
      top: the slowest rank's, by window, in the best plan so far.
    """

    expert_of_slot: Int[Array, "rows ranks size"]
    copies: Float[Array, "rows experts1"]
    tokens: Float[Array, "rows windows ranks"]
    top: Float[Array, "rows windows"]


def start_state(
    experts: Int[Array, "rows ranks size"],
    loads: Float[Array, "rows experts1 windows"],
    *,
    route: Routing | None = None,
    cost: Float[Array, "ranks"] | None = None,
) -> SearchState:
    """State of given plans under `loads`, relative to the mean over ranks; see `improve`."""
    rows, ranks, size = experts.shape
    row = jnp.arange(rows)[:, None]
    flat = experts.reshape(rows, -1)
    copies = jnp.zeros(loads.shape[:2], loads.dtype).at[row, flat].add(1.0).at[:, -1].set(1.0)
    if route is None:
        per_slot = (loads / copies[..., None])[row, flat]
        tokens = per_slot.reshape(rows, ranks, size, -1).sum(2).swapaxes(1, 2)
    else:
        held = jnp.zeros((rows, loads.shape[1], ranks), bool)
        held = held.at[row, flat, jnp.arange(ranks * size) // size].set(True)
        tokens = jnp.einsum("ner,new->nwr", route(held), loads)
    tokens = tokens if cost is None else tokens * cost
    return SearchState(experts, copies, tokens, tokens.max(-1))


@partial(
    jax.jit, static_argnames=("layers", "swaps", "tail", "ignore_slower", "route", "keep_empty")
)
def improve(
    state: SearchState,
    loads: Float[Array, "rows experts1 windows"],
    theta: Float[Array, "rounds"],
    patience: Float[Array, "rounds swaps1"],
    slots: Int[Array, "rounds swaps1 candidates"],
    chance: Float[Array, "rounds swaps1 windows ranks"],
    *,
    layers: int,
    swaps: int,
    tail: int,
    ignore_slower: bool = False,
    route: Routing | None = None,
    keep_empty: bool = False,
    cost: Float[Array, "ranks"] | None = None,
) -> SearchState:
    """Rounds of one overwrite and `swaps` swaps.

    Args:
      state: plans to improve; rows of one starting plan follow each other, layer by layer.
      loads: tokens of every expert over the mean tokens of a rank, per window; the last row zero.
      theta: level of each round, in [0, 1).
      patience: what a step may raise the penalty by, over the largest aim[w] - 1: exponential
        numbers times τ, or 0 to make no plan worse.
      slots: the other slots that each step tries; the same for every row.
      chance: standard exponential numbers, which draw the hot rank.
      layers: whose times add up.
      swaps: swap steps a round; `slots` and `chance` hold one more step, for the overwrite.
      tail: how many of the slowest windows count.
      ignore_slower: only the fastest of the tail counts, not those slower than it (a quantile).
      route: the rule that gives copies their shares; None is an even split, which is faster.
      keep_empty: empty slots stay so many, one on a rank at most; else they are filled.
      cost: what a token costs on each rank; None is 1 everywhere.
    """
    one = partial(
        _round,
        swaps=swaps, ignore_slower=ignore_slower, route=route, keep_empty=keep_empty, cost=cost,
    )  # fmt: skip
    by_row = jax.vmap(one, (0, 0, 0, None, None, None, None))

    def step(state, drawn):
        total = state.top.reshape(-1, layers, state.top.shape[-1]).mean(1)
        slack = jnp.sort(total)[:, -tail, None] - total
        return by_row(state, jnp.repeat(slack, layers, axis=0), loads, *drawn), None

    return jax.lax.scan(step, state, (theta, patience, slots, chance))[0]


def _round(
    state, slack, loads, theta, patience, slots, chance,
    *, swaps, ignore_slower, route, keep_empty, cost,
):  # fmt: skip
    """One row: experts [ranks, size], tokens [windows, ranks], slack [windows]."""
    excess = jnp.maximum(state.top + jnp.maximum(slack, 0) - 1, _EPS)
    factor = 1 / ((1 - theta) * excess)
    if ignore_slower:
        factor = jnp.where(slack < 0, 0.0, factor)
    penalty = _Penalty(1 + theta * excess, factor)
    patience = patience * excess.max()
    kept = {"keep_empty": keep_empty, "cost": cost}
    state = _overwrite(state, loads, slots[0], chance[0], patience[0], penalty, route, **kept)
    per_copy = loads / state.copies[:, None]

    def step(carry, drawn):
        (experts, tokens), (tried, chances, patient) = carry, drawn
        swap = partial(_swap, per_copy=per_copy)
        if route is not None:
            swap = partial(_swap_routed, loads=loads, route=route)
        return swap(experts, tokens, tried, chances, patient, penalty, **kept), None

    (experts, tokens), _ = jax.lax.scan(
        step,
        (state.expert_of_slot, state.tokens),
        (slots[1:], chance[1:], patience[1:]),
        length=swaps,
    )
    found = tokens.max(-1)
    better = penalty.over(found) < penalty.over(state.top)
    return SearchState(experts, state.copies, tokens, jnp.where(better, found, state.top))


class _Penalty(NamedTuple):
    """Φ of one row: T and u by window."""

    level: Array
    factor: Array

    def by_window(self, tokens):
        """Contribution of tokens [..., windows], window by window."""
        return self.factor * jnp.square(jnp.maximum(tokens - self.level, 0))

    def __call__(self, tokens):
        return self.by_window(tokens).sum(-1)

    def over(self, top):
        """What the slowest ranks, by window, have above their level."""
        return jnp.where(self.factor > 0, jnp.maximum(top - self.level, 0), 0.0).sum()


def _hot_rank(tokens, chance, penalty):
    """Drawn in proportion to its share of Φ (the largest of share / exponential)."""
    share = penalty.by_window(tokens.T).T  # [windows, ranks]
    return (share / chance).argmax() % tokens.shape[1]


def _best(gain, patience):
    """The slot of the hot rank and the candidate that gain most, and whether that is enough."""
    best = gain.argmax()
    return *jnp.divmod(best, gain.shape[1]), gain.reshape(-1)[best] > -patience


def _swap(experts, tokens, slots, chance, patience, penalty, *, per_copy, keep_empty, cost):
    size, nothing = experts.shape[1], len(per_copy) - 1
    hot = _hot_rank(tokens, chance, penalty)
    other = slots // size
    here, there = experts[hot], experts.reshape(-1)[slots]  # [size], [candidates]
    # Moved off the hot rank, for every pair of a slot there and a candidate: [size, cand, windows].
    shift = per_copy[here][:, None] - per_copy[there]
    off = shift if cost is None else shift * cost[hot]
    on = shift if cost is None else shift * cost[other][:, None]
    hot_tokens, other_tokens = tokens[:, hot], tokens.T[other]
    gain = (
        penalty(hot_tokens) + penalty(other_tokens)
        - penalty(hot_tokens - off) - penalty(other_tokens + on)
    )  # fmt: skip
    doubles = _swap_doubles(experts, here, there, other, nothing + keep_empty)
    gain = jnp.where(doubles | (other == hot), -jnp.inf, gain)
    i, j, better = _best(gain, patience)
    e, f = here[i], there[j]
    experts = experts.at[hot, i].set(jnp.where(better, f, e))
    experts = experts.at[other[j], slots[j] % size].set(jnp.where(better, e, f))
    left, come = (jnp.where(better, moved[i, j], 0.0) for moved in (off, on))
    return experts, tokens.at[:, hot].add(-left).at[:, other[j]].add(come)


def _swap_doubles(experts, here, there, other, kinds):
    """Where a rank would hold something numbered below `kinds` twice, [size, candidates]."""
    arriving = ((here[:, None] == there) & (there < kinds)).any(0)
    return arriving | (experts[other] == here[:, None, None]).any(-1)


def _swap_routed(
    experts, tokens, slots, chance, patience, penalty, *, loads, route, keep_empty, cost
):  # fmt: skip
    """`_swap` where a copy's share depends on which ranks hold the others."""
    slots = slots[: max(1, len(slots) // _ROUTED)]
    ranks, size = experts.shape
    nothing = loads.shape[0] - 1
    hot = _hot_rank(tokens, chance, penalty)
    other = slots // size
    here, there = experts[hot], experts.reshape(-1)[slots]
    held_here = (experts == here[:, None, None]).any(-1)  # [size, ranks]
    held_there = (experts == there[:, None, None]).any(-1)  # [candidates, ranks]
    at_hot, at_other = jnp.arange(ranks) == hot, jnp.arange(ranks) == other[:, None]
    gone = (held_here & ~at_hot)[:, None] | at_other  # e from the hot rank to the other
    come = (held_there & ~at_other) | at_hot
    change_e = route(gone) - route(held_here)[:, None]  # [size, candidates, ranks]
    change_f = route(come) - route(held_there)
    if cost is not None:
        change_e, change_f = change_e * cost, change_f * cost
    new = (
        tokens.T
        + change_e[..., None] * loads[here][:, None, None]
        + (change_f[..., None] * loads[there][:, None])
    )  # [size, candidates, ranks, windows]
    gain = penalty(tokens.T).sum() - penalty(new).sum(-1)
    doubles = _swap_doubles(experts, here, there, other, nothing + keep_empty)
    gain = jnp.where(doubles | (other == hot), -jnp.inf, gain)
    i, j, better = _best(gain, patience)
    e, f = here[i], there[j]
    experts = experts.at[hot, i].set(jnp.where(better, f, e))
    experts = experts.at[other[j], slots[j] % size].set(jnp.where(better, e, f))
    return experts, jnp.where(better, new[i, j].T, tokens)


def _overwrite(state, loads, slots, chance, patience, penalty, route, *, keep_empty, cost):
    experts, copies, tokens = state.expert_of_slot, state.copies, state.tokens
    ranks, size = experts.shape
    nothing = loads.shape[0] - 1
    slots = slots[: max(1, len(slots) // 8)]
    hot = _hot_rank(tokens, chance, penalty)
    other = slots // size
    here, there = experts[hot], experts.reshape(-1)[slots]
    held_here = (experts == here[:, None, None]).sum(-1).astype(tokens.dtype)  # [size, ranks]
    held_there = (experts == there[:, None, None]).sum(-1).astype(tokens.dtype)
    target = jax.nn.one_hot(other, ranks, dtype=tokens.dtype)
    # Share of the expert's tokens that each rank gains: [size, candidates, ranks].
    if route is None:
        more, fewer = copies[here] + 1, jnp.maximum(copies[there] - 1, 1)
        gain_e = (held_here[:, None] + target) / more[:, None, None] - (
            held_here / copies[here][:, None]
        )[:, None]
        gain_f = (held_there - target) / fewer[:, None] - held_there / copies[there][:, None]
    else:
        gain_e = route(held_here[:, None] + target > 0) - route(held_here > 0)[:, None]
        gain_f = route(held_there - target > 0) - route(held_there > 0)
    gain_f = jnp.where((there == nothing)[:, None], 0.0, gain_f)
    if cost is not None:
        gain_e, gain_f = gain_e * cost, gain_f * cost
    new = (
        tokens.T
        + gain_e[..., None] * loads[here][:, None, None]
        + gain_f[..., None] * loads[there][:, None]
    )  # [size, candidates, ranks, windows]
    gain = penalty(tokens.T).sum() - penalty(new).sum(-1)
    free = ((there == nothing) & (not keep_empty)) | ((copies[there] > 1) & (there < nothing))
    doubles = (experts[other] == here[:, None, None]).any(-1) | (here == nothing)[:, None]
    gain = jnp.where(doubles | ~free, -jnp.inf, gain)
    i, j, better = _best(gain, patience)
    e, f = here[i], there[j]
    spot = (other[j], slots[j] % size)
    changed = copies.at[e].add(1.0).at[f].add(jnp.where(f == nothing, 0.0, -1.0))
    return SearchState(
        expert_of_slot=experts.at[spot].set(jnp.where(better, e, f)),
        copies=jnp.where(better, changed, copies),
        tokens=jnp.where(better, new[i, j].T, tokens),
        top=state.top,
    )
