"""The buffers of a model's parameters on their devices, filled tensor by tensor in place.

A buffer is made once, on the device whose ranks hold it, and every write donates it back to XLA:
loading needs the model's own memory and that of one tensor. Of several processes each fills those
of its own devices, and reads what goes there.
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
from cmjax.models.moe.arithmetic import Precision
from cmjax.models.moe.checkpoint import block_fp8
from cmjax.models.moe.checkpoint.tensor_names import SHARED, Form, Path, WeightMapping
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layers.linear import quantize_columns
from cmjax.models.moe.model import abstract_model
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import param_specs
from cmjax.models.moe.slots import SlotTable, stack_tables


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
        precision: Precision,
        mtp: bool,
        mesh: RankMesh | None,
    ):
        if parallelism.ranks != (mesh.ranks if mesh else 1):
            raise ValueError(
                f"load_params: a parallelism over {parallelism.ranks} ranks needs a mesh of "
                f"as many, got {mesh}"
            )
        self.config, self.parallelism, self.mesh = config, parallelism, mesh
        _, self.shapes = abstract_model(config, parallelism, precision, mtp=mtp)
        self.specs = param_specs(self.shapes, parallelism)
        self.mtp = mtp
        self.held: dict[tuple[Path, int], jax.Array] = {}
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
                home = self.home
                self.held[(*path, name), home] = jax.device_put(values, self.devices[home])

    def finish(self) -> dict[str, Any]:
        """The parameters; with a mesh, as global arrays on it."""

        def whole(path, shape):
            keys = tuple(str(entry.key) for entry in path)
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
        names = [place.path]
        if place.path[-1] == "weight" and "scale" in _at(self.shapes, place.path[:-1]):
            names.append((*place.path[:-1], "scale"))
        targets = tuple(self._buffer(name, node) for name in names)
        index, axis = place.index, None
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
            block=block,
            split=None if axis is None else (axis, self.parallelism.ranks),
        )
        # Awaited, or tensors would be read faster than written and pile up.
        for name, buffer in zip(names, jax.block_until_ready(written), strict=True):
            self.held[name, node] = buffer

    def _buffer(self, path: Path, node: int) -> jax.Array:
        if (path, node) not in self.held:
            leaf = _at(self.shapes, path)
            lead = (self.ranks_per_device,) if self._is_ranked(path) else ()
            zeros = jnp.zeros((*lead, *leaf.shape), leaf.dtype, device=self.devices[node])
            self.held[path, node] = zeros
        return self.held.pop((path, node))  # donated: nobody else may hold it

    def _is_ranked(self, path: Path) -> bool:
        return self.mesh is not None and _at(self.specs, path) is RANKED


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@functools.partial(
    jax.jit,
    static_argnames=("form", "which", "column", "block", "split"),
    donate_argnums=0,
)
def _write(
    targets: tuple[jax.Array, ...],
    tensor: jax.Array,
    scale: jax.Array | None,
    start: jax.Array,
    *,
    form: Form,
    which: int,
    column: int,
    block: block_fp8.Block,
    split: tuple[int, int] | None,
) -> tuple[jax.Array, ...]:
    """Part `which` of a file's tensor, written into `targets` (a parameter, and its INT8 scale).

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
    values = (value,) if len(targets) == 1 else quantize_columns(value.astype(jnp.float32))
    results = []
    for target, part in zip(targets, values, strict=True):
        lead = start.shape[0] - 1
        part = part.astype(target.dtype).reshape((1,) * lead + part.shape)
        corner = [start[1 + axis] for axis in range(lead)] + [0] * (target.ndim - lead - 1)
        results.append(lax.dynamic_update_slice(target, part, (*corner, column)))
    return tuple(results)
