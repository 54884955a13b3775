"""Exact local search: small changes of whole plans, judged by the priced time itself.

From a slot i (on a busy rank, usually) holding expert e and a slot j holding f, three moves:

    swap       i holds f, j holds e
    replicate  j holds e too          (f gives up a copy)
    retire     i holds f too          (e gives up a copy, f gains one)

Each step draws moves at random, prices all of them exactly from the two experts' old and new
spread over the ranks, and takes the best if it is better. Steps run under one `jit` for all layers
and all starting plans; a step never makes a plan worse.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from cmjax.placement.pricing import LayerTime

_EVENNESS = 1e-2  # weight of the spread of tokens: breaks ties between plans of equal price
_RESOLUTION = 3e-7  # smaller gains are rounding errors of single precision


@partial(jax.jit, static_argnames=("ranks", "moves", "steps", "layer_time_s"))
def descend(
    experts: Int[Array, "plans layers slots"],
    counts: Float[Array, "windows layers experts"],
    scale_s: Float[Array, "layers"],
    key: Key[Array, ""],
    *,
    ranks: int,
    moves: int,
    steps: int,
    layer_time_s: LayerTime,
) -> Int[Array, "plans layers slots"]:
    """Improve every plan of every layer by `steps` steps of the best of `moves` random moves.

    Args:
      experts: expert of each slot, slots of rank 0 first.
      counts: tokens.
      scale_s: seconds that count as one, per layer.
      key: randomness, shared by no two layers or plans.
      ranks, moves, steps: sizes.
      layer_time_s: the priced layer.
    Returns: plans of the same shape, none of higher price.
    """
    plans, layers, _ = experts.shape
    keys = jax.random.split(key, (plans, layers, steps))
    one = partial(_descend_layer, ranks=ranks, moves=moves, layer_time_s=layer_time_s)
    return jax.vmap(jax.vmap(one, (0, 1, 0, 0)), (0, None, None, 0))(experts, counts, scale_s, keys)


def _descend_layer(experts, counts, scale_s, keys, *, ranks, moves, layer_time_s):
    """One plan of one layer: experts [slots], counts [windows, experts]."""
    slots, size = experts.shape[0], experts.shape[0] // ranks
    home = jnp.arange(slots) // size
    spread = jnp.zeros((counts.shape[1], ranks)).at[experts, home].add(1.0)
    tokens = counts @ (spread / spread.sum(-1, keepdims=True))

    def score(tokens):
        """Relative price with ties broken; tokens [..., windows, ranks]."""
        relative = tokens / tokens.mean(-1, keepdims=True)
        uneven = jnp.square(relative - 1).mean((-1, -2))
        return layer_time_s(tokens).mean(-1) / scale_s + _EVENNESS * uneven

    def step(state, key):
        experts, spread, tokens = state
        i, j, from_i, from_j = _draw(key, tokens, slots, size, moves)
        e, f = experts[i], experts[j]
        here, there = jax.nn.one_hot(home[i], ranks), jax.nn.one_hot(home[j], ranks)
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
        scores = jnp.where(allowed, score(moved), jnp.inf)
        best = scores.argmin()
        better = scores[best] < score(tokens) - _RESOLUTION

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

    (experts, _, _), _ = jax.lax.scan(step, (experts, spread, tokens), keys)
    return experts


def _draw(key, tokens, slots, size, moves):
    """Random moves: slots i and j, and whether i and j change hands (1.0 or 0.0), each [moves]."""
    window_key, busy_key, i_key, j_key, kind_key = jax.random.split(key, 5)
    window = jax.random.randint(window_key, (moves,), 0, tokens.shape[0])
    busiest = tokens.argmax(-1)[window]
    anywhere = jax.random.randint(i_key, (moves,), 0, slots)
    busy = jax.random.uniform(busy_key, (moves,)) < 0.75
    i = jnp.where(busy, busiest * size + anywhere % size, anywhere)
    j = jax.random.randint(j_key, (moves,), 0, slots)
    kind = jax.random.randint(kind_key, (moves,), 0, 4)  # 0, 1: swap; 2: replicate; 3: retire
    return i, j, (kind != 2).astype(tokens.dtype), (kind != 3).astype(tokens.dtype)


def _share(spread):
    return spread / jnp.maximum(spread.sum(-1, keepdims=True), 1)
