"""The buffers of a model's parameters on their devices, filled tensor by tensor in place.

A buffer is made once, on the device whose ranks hold it, and every write donates it back to XLA:
loading needs the model's own memory and that of one tensor. A matrix is rounded to the arithmetic's
format as it is written, from the file's values: nothing is ever held in two formats. Of several
processes each fills those of its own devices, and reads what goes there.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from cmjax.mesh import RANKED, RankMesh
from cmjax.models.moe.arithmetic import Arithmetic, ExpertFormat
from cmjax.models.moe.checkpoint import block_fp8
from cmjax.models.moe.checkpoint.tensor_names import SHARED, Form, Path, WeightMapping
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layered import is_stacked, split_shapes
from cmjax.models.moe.layers.linear import encode_weight, format_of
from cmjax.models.moe.model import abstract_model
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import param_specs
from cmjax.models.moe.slots import SlotTable, stack_tables

_Key = tuple[str | int, ...]
"""Of a parameter, and behind it the layer where layers have arrays of their own."""


class _Destination(NamedTuple):
    """Where a part of a tensor goes."""

    path: Path
    index: tuple[int, ...]  # in the leading axes of a rank's parameter
    rank: int | None = None  # None: a parameter that all ranks share
    heads_of: int | None = None  # the rank whose part of the heads it is


class ParameterBuffers:
    """Parameters in the making: `place` every tensor, `place_tables`, then `finish`."""

    def __init__(
        self,
        config: MoEConfig,
        parallelism: Parallelism,
        precision: Arithmetic | str,
        mtp: bool,
        mesh: RankMesh | None,
        *,
        split: bool = False,
    ):
        """Args: split: make an array for every layer, as `split_layers` does."""
        if parallelism.ranks != (mesh.ranks if mesh else 1):
            raise ValueError(
                f"load_params: a parallelism over {parallelism.ranks} ranks needs a mesh of "
                f"as many, got {mesh}"
            )
        self.config, self.parallelism, self.mesh = config, parallelism, mesh
        _, self.stacked = abstract_model(config, parallelism, precision, mtp=mtp)
        self.specs = param_specs(self.stacked, parallelism)
        self.shapes = split_shapes(self.stacked) if split else self.stacked
        self.mtp, self.split = mtp, split
        self.held: dict[tuple[_Key, int], jax.Array] = {}
        devices = jax.devices()[:1] if mesh is None else list(mesh.concrete().devices.flat)
        self.devices = devices
        here = [n for n, d in enumerate(devices) if d.process_index == jax.process_index()]
        self.here, self.home = frozenset(here), here[0]  # nodes; where what all share is made
        self.ranks_per_device = parallelism.ranks // len(devices)

    def holds(self, mapping: WeightMapping, tables: Sequence[SlotTable]) -> bool:
        """Whether a part of a tensor goes to a device of this process."""
        return any(self._destinations(mapping, path, tables) for path in mapping.paths)

    def place(
        self,
        mapping: WeightMapping,
        tables: Sequence[SlotTable],
        tensor: np.ndarray,
        scale: np.ndarray | None,
        block: block_fp8.Block,
    ) -> None:
        """Write one tensor of a checkpoint to wherever it belongs; waits until it is there."""
        for which, path in enumerate(mapping.paths):
            for node, places in self._destinations(mapping, path, tables).items():
                values = jax.device_put((tensor, scale), self.devices[node])
                for place in places:
                    self._write(place, node, values, mapping, which, block)

    def place_tables(self, tables: Sequence[SlotTable]) -> None:
        """Write which slots hold which expert, per layer."""
        width = self.parallelism.table.max_copies
        count = self.config.moe_layers
        groups = [(("main", "moe", "layers", "moe"), tables[:count])] if count else []
        if self.mtp:
            groups.append((("mtp", "stack", "layers", "moe"), tables[count:]))
        for path, own in groups:
            for name, values in zip(
                ("slots_of_expert", "copies"), stack_tables(own, width), strict=True
            ):
                parts = {(*path, name): values}
                if self.split and is_stacked(path):
                    parts = {(*path, name, layer): part for layer, part in enumerate(values)}
                for key, part in parts.items():
                    self.held[key, self.home] = jax.device_put(part, self.devices[self.home])

    def finish(self) -> dict[str, Any]:
        """The parameters; with a mesh, as global arrays on it."""

        def whole(path, shape):
            keys: _Key = tuple(_key_of(entry) for entry in path)
            if self.mesh is None:
                return self.held.pop((keys, self.home))
            nodes, mesh = sorted(self.here), self.mesh.concrete()
            if self._is_ranked(keys):
                shards = [self.held.pop((keys, node)) for node in nodes]
                shape, spec = (self.parallelism.ranks, *shape.shape), PartitionSpec("node")
            else:
                one = self.held.pop((keys, self.home))
                shards = [jax.device_put(one, self.devices[node]) for node in nodes]
                shape, spec = one.shape, PartitionSpec()
            where = NamedSharding(mesh, spec)
            return jax.make_array_from_single_device_arrays(shape, where, shards)

        return jax.tree_util.tree_map_with_path(whole, self.shapes)

    def _destinations(
        self, mapping: WeightMapping, path: Path, tables: Sequence[SlotTable]
    ) -> dict[int, list[_Destination]]:
        """By node of this process."""
        by_node: dict[int, list[_Destination]] = {}
        for place in self._places(mapping, path, tables):
            node = self.home if place.rank is None else place.rank // self.ranks_per_device
            if node in self.here:
                by_node.setdefault(node, []).append(place)
        return by_node

    def _places(
        self, mapping: WeightMapping, path: Path, tables: Sequence[SlotTable]
    ) -> Iterator[_Destination]:
        shared_in_slots = mapping.expert == SHARED and self.parallelism.table.has_shared
        if shared_in_slots or mapping.expert not in (None, SHARED):
            layer = self.config.moe_layers if path[0] == "mtp" else mapping.index[0]
            table = tables[layer]
            expert = table.routed_experts if shared_in_slots else mapping.expert
            assert expert is not None, "the condition above"
            path = tuple("experts" if key == "shared" else key for key in path)
            for slot in table.slots_of_expert[expert]:
                rank, local = divmod(slot, table.slots_per_rank)
                yield _Destination(
                    path, (*mapping.index, local), rank if self._is_ranked(path) else None
                )
        elif self._is_ranked(path):  # heads are split over the ranks
            for rank in range(self.parallelism.ranks):
                yield _Destination(path, mapping.index, rank, heads_of=rank)
        else:
            yield _Destination(path, mapping.index)

    def _write(
        self, place: _Destination, node: int, values, mapping: WeightMapping, which: int, block
    ) -> None:
        index, axis = place.index, None
        names, format = self._held_as(place.path)
        if self.split and is_stacked(place.path):
            layer, *index = index
            names = {name: (*path, layer) for name, path in names.items()}
        targets = {name: self._buffer(path, node) for name, path in names.items()}
        if place.rank is not None:
            index = (place.rank % self.ranks_per_device, *index)
        if place.heads_of is not None:
            axis = -1 if place.path[-1] == "weight" else 0  # columns of q_b, heads of the others
        start = np.array([place.heads_of or 0, *index], np.int32)
        written = _write(
            targets,
            *values,
            start,
            form=mapping.form,
            which=which,
            column=mapping.column,
            format=format,
            block=block,
            split=None if axis is None else (axis, self.parallelism.ranks),
        )
        # Awaited, or tensors would be read faster than written and pile up.
        for name, buffer in jax.block_until_ready(written).items():
            self.held[names[name], node] = buffer

    def _held_as(self, path: _Key) -> tuple[dict[str | int, _Key], ExpertFormat | None]:
        """The parameters that hold what a file has as `path`, by name, and their format; `None`
        for floating point."""
        *module, name = path
        siblings = _at(self.stacked, module)
        if name != "weight" or "scale" not in siblings:
            return {name: path}, None
        names = ("values" if "values" in siblings else "weight", "scale")
        return {name: (*module, name) for name in names}, format_of(siblings)

    def _buffer(self, path: _Key, node: int) -> jax.Array:
        if (path, node) not in self.held:
            leaf = _at(self.shapes, path)
            lead = (self.ranks_per_device,) if self._is_ranked(path) else ()
            zeros = jnp.zeros((*lead, *leaf.shape), leaf.dtype, device=self.devices[node])
            self.held[path, node] = zeros
        return self.held.pop((path, node))  # donated: nobody else may hold it

    def _is_ranked(self, path: _Key) -> bool:
        if self.mesh is None:
            return False
        path = path[:-1] if isinstance(path[-1], int) else path
        names, _ = self._held_as(path)
        return all(_at(self.specs, held) is RANKED for held in names.values())


def _key_of(entry: Any) -> str | int:
    """A dictionary's key, or the place in a tuple."""
    return entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else str(entry.key)


def _at(tree: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@functools.partial(
    jax.jit,
    static_argnames=("form", "which", "column", "format", "block", "split"),
    donate_argnums=0,
)
def _write(
    targets: dict[str | int, jax.Array],
    tensor: jax.Array,
    scale: jax.Array | None,
    start: jax.Array,
    *,
    form: Form,
    which: int,
    column: int,
    format: ExpertFormat | None,
    block: block_fp8.Block,
    split: tuple[int, int] | None,
) -> dict[str | int, jax.Array]:
    """Part `which` of a file's tensor, written into `targets`: a parameter, or those that hold it
    in `format`.

    `start` is which share of the heads to take (with `split`: axis, number of parts), then the
    place in the target's leading axes.
    """
    if scale is not None:
        tensor = block_fp8.dequantize(tensor, scale, block)
    value = form.split(tensor)[which]
    if split is not None:
        axis, parts = split
        size = value.shape[axis] // parts
        value = lax.dynamic_slice_in_dim(value, start[0] * size, size, axis % value.ndim)
    parts = dict.fromkeys(targets, value) if format is None else encode_weight(value, format)
    values: dict[Any, jax.Array] = {**parts}
    results = {}
    for name, target in targets.items():
        lead = start.shape[0] - 1
        part = values[name].astype(target.dtype)
        corner = [0] * part.ndim
        corner[_column_axis(name, part)] = column
        part = part.reshape((1,) * lead + part.shape)
        results[name] = lax.dynamic_update_slice(target, part, (*start[1:], *corner))
    return results


def _column_axis(name: str | int, part: jax.Array) -> int:
    """Which axis of a parameter of a `Linear` is that of its outputs."""
    features_first = name == "values" or (name == "scale" and part.dtype == jnp.uint8)
    return -2 if features_first else -1
