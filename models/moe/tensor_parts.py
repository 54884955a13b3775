"""Which part of every parameter a rank of a tensor-parallel group holds.

A column-parallel matrix gives a rank its own outputs, a row-parallel one takes them; what the
ranks' row-parallel products make is added up (Shoeybi et al. 2019, arXiv:1909.08053, section 3):

    column-parallel: q_b, up_key, up_value or qkv; gate_up; embed and head, over the vocabulary
    row-parallel:    out; down
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from cmjax.models.moe.config import GroupedAttention, MoEConfig

_SPLIT = ("q_b", "up_key", "up_value", "qkv", "out", "ffn", "shared", "embed", "head")
Columns = Int[np.ndarray, "ranks columns"]


def is_split(path: Sequence[str]) -> bool:
    """Whether ranks of a group hold different parts of the parameter at a path."""
    return not set(_SPLIT).isdisjoint(path)


def group_parts(
    params: dict[str, Any], config: MoEConfig, tensor: int, groups: int = 1
) -> dict[str, Any]:
    """The parameters of a model of which those that are split get a leading axis of ranks.

    Args:
      params: nested dict of parameters with all heads and columns, in any arithmetic.
      config: the model. tensor: ranks of a group. groups: how many there are, one after another.
    """
    splits: dict[str, Callable[[Any], Any]] = {
        "attention": lambda part: part | _attention(part, config, tensor),
        "ffn": lambda part: _swiglu(part, tensor),
        "shared": lambda part: _swiglu(part, tensor),
        "embed": lambda part: _vocabulary({"values": part}, config, tensor)["values"],
        "head": lambda part: _vocabulary(part, config, tensor),
    }

    def walk(name: str, part: Any) -> Any:
        if name in splits:
            return _of_groups(part, splits[name](part), groups)
        if isinstance(part, dict):
            return {key: walk(key, value) for key, value in part.items()}
        return part

    return {key: walk(key, value) for key, value in params.items()}


def _of_groups(whole: Any, parts: Any, groups: int) -> Any:
    """What is split, once for each group."""
    if not isinstance(parts, dict):
        return parts if parts.ndim == whole.ndim else jnp.concatenate([parts] * groups)
    return {name: _of_groups(whole[name], part, groups) for name, part in parts.items()}


def _attention(attention: dict[str, Any], config: MoEConfig, tensor: int) -> dict[str, Any]:
    split: dict[str, Any] = {}
    sizes = config.attention
    if isinstance(sizes, GroupedAttention):
        heads, kv_heads, dim = config.heads, sizes.kv_heads, sizes.head_dim
        # ranks that attend with the same key and value head have a copy of it each
        kept = np.arange(tensor * sizes.kv_heads_of(tensor)).reshape(tensor, -1)
        kept = kept * kv_heads // max(kv_heads, tensor)
        within = np.arange(dim)
        key = (kept[..., None] * dim + within).reshape(tensor, -1)
        query = _even(heads * dim, tensor)
        columns = [query, heads * dim + key, (heads + kv_heads) * dim + key]
        split["qkv"] = _columns(attention["qkv"], np.concatenate(columns, axis=1))
    else:
        split["q_b"] = _columns(attention["q_b"], _even(config.heads * sizes.qk_dim, tensor))
        for name in ("up_key", "up_value"):  # [layers, heads, ...]
            split[name] = _take(attention[name], -3, _even(config.heads, tensor))
    split["out"] = _rows(attention["out"], tensor)
    return split


def _vocabulary(linear: dict[str, Any], config: MoEConfig, tensor: int) -> dict[str, Any]:
    """The embedding, or the head: a part of the vocabulary, filled up with zeros."""
    width = -(-config.vocab_size // tensor) * tensor

    def filled(name: str, x: jax.Array) -> jax.Array:
        room = [(0, 0)] * x.ndim
        room[_outputs(name, x)] = (0, width - config.vocab_size)
        return jnp.pad(x, room)

    linear = {name: filled(name, x) for name, x in linear.items()}
    return _columns(linear, _even(width, tensor))


def _swiglu(block: dict[str, Any], tensor: int) -> dict[str, Any]:
    """A part of the gate and the same one of what it multiplies."""
    name, matrix = next((n, x) for n, x in block["gate_up"].items() if n in ("weight", "values"))
    inner = matrix.shape[_outputs(name, matrix)] // 2
    both = np.concatenate([_even(inner, tensor), inner + _even(inner, tensor)], axis=1)
    return block | {
        "gate_up": _columns(block["gate_up"], both),
        "down": _rows(block["down"], tensor),
    }


def _columns(linear: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """A `Linear` of which each rank has some outputs."""
    return {name: _take(x, _outputs(name, x), columns) for name, x in linear.items()}


def _rows(linear: dict[str, Any], tensor: int) -> dict[str, Any]:
    """A `Linear` of which each rank has an equal part of the inputs. The ranks' results are added
    up, so the first one alone has the bias."""

    def part(name: str, x: jax.Array) -> jax.Array:
        if name == "bias":
            return jnp.stack([x, *[jnp.zeros_like(x)] * (tensor - 1)])
        axis = -2 if name == "weight" else -1
        if name == "scale" and not _per_block(x):  # a step of an output
            return jnp.stack([x] * tensor)
        return _take(x, axis, _even(x.shape[axis], tensor))

    return {name: part(name, x) for name, x in linear.items()}


def _outputs(name: str, x: jax.Array) -> int:
    """The axis of a `Linear`'s parameter that counts outputs."""
    return -2 if name == "values" or (name == "scale" and _per_block(x)) else -1


def _per_block(scale: jax.Array) -> bool:
    """Whether there is a scale for every block of inputs (MXFP4) and not one for an output."""
    return scale.dtype == jnp.uint8


def _even(width: int, ranks: int) -> Columns:
    """Numbers `0 .. width - 1` in equal parts."""
    return np.arange(width).reshape(ranks, -1)


def _take(x: jax.Array, axis: int, columns: Columns) -> jax.Array:
    """The entries of every rank along an axis: `[ranks, ...]`."""
    return jnp.stack([jnp.take(x, own, axis=axis) for own in columns])
