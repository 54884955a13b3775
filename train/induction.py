"""The pair of heads that recall takes, set before training.

An induction head (Olsson et al., "In-context Learning and Induction Heads", 2022) finds what
followed a token earlier in the text. It builds on a head one layer below, which looks at the token
before and writes down what that was. Left to itself, training comes upon the pair at a step that
differs by a thousand between seeds; given it, a hundred steps teach what to say with it.

Width 0 of what the layers read must be the same for all tokens: a query made of it alone is the
same at all places.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.models.moe.layers.gqa import GQA
from cmjax.models.moe.layers.rope import angles, frequencies, rotate

_SHARPNESS = 10.0  # of the look at the token before


class Directions(NamedTuple):
    """Orthonormal, without width 0; as many as a head has slow dimensions."""

    read: Float32[np.ndarray, "slow hidden"]  # along these a token says which it is
    write: Float32[np.ndarray, "slow hidden"]  # along these the lower head says which came before


def plant(lower: nnx.Module, upper: nnx.Module, config: MoEConfig, *, seed: int) -> None:
    """Set head 0 of both attentions; the other heads stay as they are.

    Args:
      lower, upper: `GQA` in floating point, stacked: their parameters have a layer axis of 1.
      config: of both.
      seed: draws the directions.

    Raises:
      ValueError: the hidden width has no room for the directions.
    """
    assert isinstance(lower, GQA) and isinstance(upper, GQA)
    below, out, above = lower.qkv.weight, lower.out.weight, upper.qkv.weight
    assert below is not None and out is not None and above is not None  # floats have one
    chosen = directions(config, seed)
    below[...] = write_down(look_back(below[0], config), chosen, config)[None]
    out[...] = out[...].at[0, : _sizes(config).head_dim].set(_rows(chosen.write, config))
    above[...] = match(above[0], chosen, config)[None]


def directions(config: MoEConfig, seed: int) -> Directions:
    """Random ones."""
    count, widths = int(_slow(config).sum()), config.hidden_size - 1
    if 2 * count > widths:
        raise ValueError(
            f"induction: {2 * count} directions, two for each slow dimension of a head, do not fit "
            f"the {widths} free widths of hidden_size {config.hidden_size}; narrow the heads"
        )
    drawn = np.random.default_rng(seed).normal(size=(widths, 2 * count))
    rows = np.pad(np.linalg.qr(drawn)[0].T, ((0, 0), (1, 0))).astype(np.float32)
    return Directions(read=rows[:count], write=rows[count:])


def look_back(
    qkv: Float[Array, "hidden columns"], config: MoEConfig
) -> Float[Array, "hidden columns"]:
    """Projections whose head 0 attends to the token before.

        q = R(i) u,  k = R(j) R(1) u:   q . k is largest where j + 1 = i

    `u` is even over the fast pairs of dimensions.
    """
    fast = ~_slow(config)
    query = jnp.asarray(_SHARPNESS * fast / np.sqrt(fast.sum()), jnp.float32)
    cos, sin = angles(jnp.array(1), config)
    # `rotate` hands out first members of all pairs, then second ones
    key = rotate(query, cos, sin, interleave=True).reshape(2, -1).T.reshape(-1)
    of_width_0 = jnp.zeros((len(qkv), 1)).at[0].set(1)
    return _set(_set(qkv, "query", of_width_0 * query, config), "key", of_width_0 * key, config)


def write_down(
    qkv: Float[Array, "hidden columns"], chosen: Directions, config: MoEConfig
) -> Float[Array, "hidden columns"]:
    """Projections whose head 0 takes from a token what it is along `read`."""
    return _set(qkv, "value", _rows(chosen.read, config).T, config)


def match(
    qkv: Float[Array, "hidden columns"],
    chosen: Directions,
    config: MoEConfig,
    sharpness: float = 2.0,
) -> Float[Array, "hidden columns"]:
    """Projections whose head 0 attends where the token written down is the present one. Only the
    slow dimensions of the head take part, so that the distance hardly matters."""
    slow = np.flatnonzero(_slow(config))
    made = jnp.zeros((2, len(qkv), _sizes(config).head_dim))
    made = made.at[:, :, slow].set(sharpness**0.5 * np.stack([chosen.read.T, chosen.write.T]))
    return _set(_set(qkv, "query", made[0], config), "key", made[1], config)


def _set(qkv, part: str, columns, config: MoEConfig) -> Float[Array, "hidden columns"]:
    """With these columns for head 0's queries, keys or values."""
    sizes = _sizes(config)
    heads = {"query": 0, "key": config.heads, "value": config.heads + sizes.kv_heads}[part]
    first = heads * sizes.head_dim
    return qkv.at[:, first : first + sizes.head_dim].set(columns)


def _rows(rows: np.ndarray, config: MoEConfig) -> np.ndarray:
    """As many as a head is wide, the missing ones zero."""
    return np.pad(rows, ((0, _sizes(config).head_dim - len(rows)), (0, 0)))


def _slow(config: MoEConfig) -> Bool[np.ndarray, "head_dim"]:
    """Dimensions that turn by at most 0.05 radians a token; the others tell neighbours apart."""
    return np.repeat(frequencies(config) <= 0.05, 2)


def _sizes(config: MoEConfig) -> GroupedAttention:
    assert isinstance(config.attention, GroupedAttention)
    return config.attention
