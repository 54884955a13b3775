"""Exact local search: small changes of whole plans, judged by the priced time itself.

From a slot i (on a busy rank, usually) holding expert e and a slot j holding f, three moves:

    swap       i holds f, j holds e
    replicate  j holds e too          (f gives up a copy)
    retire     i holds f too          (e gives up a copy, f gains one)

Each step draws moves at random, prices all of them exactly from the two experts' old and new
spread over the ranks, and takes the best if it is better. Steps run under one `jit` for all layers
and all starting plans. None raises the price; among equal prices the more even plan wins, because
the slowest rank alone does not tell a step towards a better plan from a step nowhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmjax.placement.pricing import LayerTime

_EVENNESS = 1e-2  # weight of the spread of tokens: breaks ties between plans of equal price
_RESOLUTION = 3e-7  # smaller gains are rounding errors of single precision


DRAWS = 5  # random numbers a move takes


@partial(jax.jit, static_argnames=("ranks", "layer_time_s"))
def descend(
    experts: Int[Array, "plans layers slots"],
    counts: Float[Array, "windows layers experts"],
    scale_s: Float[Array, "layers"],
    draws: Float[Array, "plans layers steps 5 moves"],
    *,
    ranks: int,
    layer_time_s: LayerTime,
) -> Int[Array, "plans layers slots"]:
    """Improve every plan of every layer, step by step, by the best of some random moves.

    Args:
      experts: expert of each slot, slots of rank 0 first.
      counts: tokens.
      scale_s: seconds that count as one, per layer.
      draws: uniform numbers in [0, 1), which say what moves each step tries. They are drawn
        outside: a generator inside the loop takes longer to compile than the search to run.
      ranks: ranks the slots are dealt to.
      layer_time_s: the priced layer.
    Returns: plans of the same shape, none of higher price (to single precision).
    """
    one = partial(_descend_layer, ranks=ranks, layer_time_s=layer_time_s)
    by_layer = jax.vmap(one, (0, 1, 0, 0))
    return jax.vmap(by_layer, (0, None, None, 0))(experts, counts, scale_s, draws)


def _descend_layer(experts, counts, scale_s, draws, *, ranks, layer_time_s):
    """One plan of one layer: experts [slots], counts [windows, experts]."""
    slots, size = experts.shape[0], experts.shape[0] // ranks
    home = jnp.arange(slots) // size
    spread = jnp.zeros((counts.shape[1], ranks), counts.dtype).at[experts, home].add(1.0)
    tokens = counts @ (spread / spread.sum(-1, keepdims=True))

    def judge(tokens):
        """Relative price, and how uneven the ranks are; tokens [..., windows, ranks]."""
        relative = tokens / tokens.mean(-1, keepdims=True)
        uneven = jnp.square(relative - 1).mean((-1, -2))
        return layer_time_s(tokens).mean(-1) / scale_s, uneven

    def step(state, drawn):
        experts, spread, tokens = state
        i, j, from_i, from_j = _moves(drawn, tokens, slots, size)
        e, f = experts[i], experts[j]
        here, there = (jax.nn.one_hot(home[slot], ranks, dtype=counts.dtype) for slot in (i, j))
        # Rank by rank, expert e gains what f loses.
        change = from_j[:, None] * there - from_i[:, None] * here
        old_e, old_f = spread[e], spread[f]
        new_e, new_f = old_e + change, old_f - change
        sums = jnp.stack([new_e.sum(-1), new_f.sum(-1)])
        crowded = (new_e > jnp.maximum(old_e, 1)) | (new_f > jnp.maximum(old_f, 1))
        allowed = (e != f) & (sums >= 1).all(0) & ~crowded.any(-1)
        shift_e = _share(new_e) - _share(old_e)
        shift_f = _share(new_f) - _share(old_f)
        moved = tokens + counts.T[e][..., None] * shift_e[:, None]
        moved = moved + counts.T[f][..., None] * shift_f[:, None]
        price, uneven = judge(tokens)
        new_price, new_uneven = judge(moved)
        gain = price - new_price + _EVENNESS * (uneven - new_uneven)
        gain = jnp.where(allowed & (new_price <= price + _RESOLUTION), gain, -jnp.inf)
        best = gain.argmax()
        better = gain[best] > _RESOLUTION

        i, j, e, f = i[best], j[best], e[best], f[best]
        takes_i, takes_j = from_i[best] > 0, from_j[best] > 0
        new = experts.at[i].set(jnp.where(takes_i, f, e))
        new = new.at[j].set(jnp.where(takes_j, e, f))
        new_spread = spread.at[e].set(new_e[best]).at[f].set(new_f[best])
        state = jax.tree.map(
            lambda old, new: jnp.where(better, new, old),
            state,
            (new, new_spread, moved[best]),
        )
        return state, None

    (experts, _, _), _ = jax.lax.scan(step, (experts, spread, tokens), draws)
    return experts


def _moves(drawn, tokens, slots, size):
    """Random moves: slots i and j, and whether i and j change hands (1.0 or 0.0), each [moves]."""
    window, busy, slot_i, slot_j, kind = drawn
    busiest = tokens.argmax(-1)[_integer(window, tokens.shape[0])]
    anywhere = _integer(slot_i, slots)
    i = jnp.where(busy < 0.75, busiest * size + anywhere % size, anywhere)
    kind = _integer(kind, 4)  # 0, 1: swap; 2: replicate; 3: retire
    from_i, from_j = (kind != 2).astype(tokens.dtype), (kind != 3).astype(tokens.dtype)
    return i, _integer(slot_j, slots), from_i, from_j


def _integer(uniform, below):
    return jnp.minimum((uniform * below).astype(jnp.int32), below - 1)


def _share(spread):
    return spread / jnp.maximum(spread.sum(-1, keepdims=True), 1)
