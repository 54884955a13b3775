"""One rank's part of a model's parameters: which ones ranks hold parts of, and spreading them.

params = shard_params(init_params(config, "float32"), parallelism)     # a leading axis of ranks
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cmjax.mesh import RANKED, REPLICATED
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.parallelism import Parallelism, check_tensor
from cmjax.models.moe.slots import SlotTable, stack_tables
from cmjax.models.moe.tensor_parts import group_parts, is_split

_HEADS = ("q_b", "up_key", "up_value")  # parameters of latent attention that are per head


def param_specs(params: dict[str, Any], parallelism: Parallelism) -> dict[str, Any]:
    """`RANKED` for what ranks hold different parts of, `REPLICATED` for the rest."""

    def spec(path, _):
        keys = [str(entry.key) for entry in path]
        ranked = "experts" in keys or (
            parallelism.sequence_parallel and not set(_HEADS).isdisjoint(keys)
        )
        ranked = ranked or (parallelism.tensor > 1 and is_split(keys))
        return RANKED if ranked else REPLICATED

    return jax.tree_util.tree_map_with_path(spec, params)


def shard_params(
    params: dict[str, Any],
    parallelism: Parallelism,
    tables: Sequence[SlotTable] | None = None,
    *,
    config: MoEConfig | None = None,
) -> dict[str, Any]:
    """Spread the parameters of a `one_rank` model over the ranks of `parallelism`.

    Args:
      params: nested dict of the one-rank model, any precision.
      parallelism: where to.
      tables: one table per MoE layer (then one for the MTP layer, if there is one); by default
        `parallelism.table` for all.
      config: the model; needed for tensor parallelism alone, which takes its heads apart.
    Returns: parameters of `parallelism`'s model; those that `param_specs` calls RANKED have a
      leading axis of ranks.
    Raises:
      ValueError: tables of another size than the parallelism's, or too few; tensor parallelism
        that the model's widths do not allow, or without a config.
    """
    tensor = parallelism.tensor
    if tensor > 1:
        if config is None:
            raise ValueError("shard_params: tensor parallelism needs config, whose heads are split")
        check_tensor(config, tensor)
    counts = [len(part["moe"]["copies"]) for part in _moe_parts(params)]
    given = iter(layer_tables(parallelism, sum(counts), tables))

    def spread(group: dict[str, Any]) -> dict[str, Any]:
        result = {}
        for name in sorted(group):  # the main model, then the MTP layer
            part = group[name]
            if name == "layers":
                part = dict(part)
                if parallelism.sequence_parallel:
                    part["attention"] = _split_heads(part["attention"], parallelism)
                if "moe" in part:
                    count = part["moe"]["copies"].shape[0]
                    own = list(itertools.islice(given, count))
                    part["moe"] = _fill_slots(part["moe"], own, parallelism.table.max_copies)
            elif isinstance(part, dict):
                part = spread(part)
            result[name] = part
        return result

    params = spread(params)
    if tensor == 1:
        return params
    assert config is not None, "was asked for above"
    return group_parts(params, config, tensor, parallelism.ranks // tensor)


def own_heads(params: dict[str, Any], parallelism: Parallelism) -> dict[str, Any]:
    """A rank's parameters under a sequence-parallel `parallelism`, out of those with all heads.

    For inside the mesh. It lets one set of parameters serve sequence-parallel prefill and
    data-parallel decode.
    """

    def take(x):
        return lax.dynamic_index_in_dim(x, parallelism.rank, 0, keepdims=False)

    def own_part(attention: dict[str, Any]) -> dict[str, Any]:
        split = _split_heads(attention, parallelism)
        return attention | {name: jax.tree.map(take, split[name]) for name in _HEADS}

    def each(group: dict[str, Any]) -> dict[str, Any]:
        return {
            name: part
            if not isinstance(part, dict)
            else part | {"attention": own_part(part["attention"])}
            if name == "layers"
            else each(part)
            for name, part in group.items()
        }

    return each(params)


def layer_tables(
    parallelism: Parallelism, layers: int, tables: Sequence[SlotTable] | None
) -> list[SlotTable]:
    """A table for each of `layers` MoE layers: the given ones, or the parallelism's for all.

    Raises:
      ValueError: tables of another number or size than the parallelism's.
    """
    if tables is None:
        return [parallelism.table] * layers
    if len(tables) != layers:
        raise ValueError(
            f"layer_tables: {len(tables)} tables for {layers} MoE layers (MTP included)"
        )
    width = parallelism.table.max_copies
    for table in tables:
        if _size(table) != _size(parallelism.table) or table.max_copies > width:
            raise ValueError(
                "layer_tables: every table must have the ranks, slots and shared slots of "
                f"parallelism.table, and at most its {width} copies of an expert; got "
                f"{_size(table)} and {table.max_copies}, expected {_size(parallelism.table)}"
            )
    return list(tables)


def _moe_parts(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The stacks of layers that have experts."""
    for name, part in group.items():
        if name == "layers":
            yield from [part] if "moe" in part else []
        elif isinstance(part, dict):
            yield from _moe_parts(part)


def _size(table: SlotTable) -> dict[str, Any]:
    return {
        "ranks": table.ranks,
        "slots": table.slots,
        "routed_experts": table.routed_experts,
        "shared": table.has_shared,
    }


def _fill_slots(moe: dict[str, Any], tables: Sequence[SlotTable], width: int) -> dict[str, Any]:
    """Copy the experts of each layer into the slots of its table: [layers, experts, ...] ->
    [ranks, layers, slots, ...]."""
    held = moe["experts"]
    result = dict(moe)
    if tables[0].has_shared:
        # The shared expert has the shape of a routed one, and becomes expert number routed_experts.
        held = jax.tree.map(
            lambda routed, shared: jnp.concatenate([routed, shared[:, None]], axis=1),
            held,
            result.pop("shared"),
        )
    chosen = jnp.array([table.experts_of_slot for table in tables])
    ranks, slots = tables[0].ranks, tables[0].slots_per_rank

    def place(x):
        layers = jnp.arange(x.shape[0])[:, None]
        filled = x[layers, chosen].reshape(x.shape[0], ranks, slots, *x.shape[2:])
        return jnp.swapaxes(filled, 0, 1)

    result["experts"] = jax.tree.map(place, held)
    result["slots_of_expert"], result["copies"] = map(jnp.asarray, stack_tables(tables, width))
    return result


def _split_heads(attention: dict[str, Any], parallelism: Parallelism) -> dict[str, Any]:
    """Column-slice the up-projections: a rank holds `heads / ranks` heads."""
    ranks = parallelism.ranks

    def columns(x):  # [layers, ..., heads * width]
        return jnp.moveaxis(x.reshape(*x.shape[:-1], ranks, x.shape[-1] // ranks), -2, 0)

    def heads(x):  # [layers, heads, ...]
        split = x.reshape(x.shape[0], ranks, x.shape[1] // ranks, *x.shape[2:])
        return jnp.swapaxes(split, 0, 1)

    q_b = attention["q_b"]
    # multi-scale products store [out, in]: the heads are the axis behind the layers
    split = (
        (lambda x: jnp.moveaxis(columns(jnp.moveaxis(x, 1, -1)), -1, 2))
        if "values" in q_b
        else columns
    )
    return attention | {
        "q_b": {name: columns(x) if name == "bias" else split(x) for name, x in q_b.items()},
        "up_key": heads(attention["up_key"]),
        "up_value": heads(attention["up_value"]),
    }
