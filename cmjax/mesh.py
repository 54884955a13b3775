"""The supernode as a JAX mesh: emulated to run on, abstract to price on.

One function, `on_every_rank`, lifts a per-rank program onto either; the program never knows which.

Emulated, a *node* is an XLA device and its NPUs and dies are virtual axes (`jax.vmap` with an axis
name, nested inside `jax.shard_map`); collectives over the axis tuple and their gradients are exact.
The split exists because XLA's CPU client runs blocking collectives on a pool of at most 256
threads: above 256 devices a program can deadlock, and 48 x 8 = 384 ranks would.

Await every step (`jax.block_until_ready`): steps dispatched ahead of their collectives can deadlock
as well.
"""

import dataclasses
import enum
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from cmjax.inputs import check_count

XLA_CPU_DEVICE_LIMIT = 256
MOST_EMULATED = 4096
"""Ranks that a mesh may have to run on; to price on it may have `_MOST_RANKS`."""
_MOST_RANKS = 2**20

# XLA aborts the process if a collective has waited 40 s for a device, and warns after 20 s. Many
# devices take turns on a few cores, so a healthy step on a loaded machine can be that slow.
_TIMEOUT_FLAGS = {
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
}
_COUNT_FLAG = "--xla_force_host_platform_device_count"


class Spec(enum.Enum):
    """How an argument or result of a per-rank program looks from outside."""

    RANKED = "a leading axis of one entry per rank, in rank order"
    REPLICATED = "the same on every rank, no extra axis"


RANKED = Spec.RANKED
REPLICATED = Spec.REPLICATED


@dataclasses.dataclass(frozen=True)
class RankMesh:
    """The ranks of a supernode partition: `nodes` x `npus` x `dies`.

    Attributes:
      nodes: number of nodes.
      npus: NPUs per node (8 in CloudMatrix384).
      dies: ranks per NPU; 1 if the NPU is one rank, 2 for one rank per die of an Ascend 910C.
      tensor: ranks of a tensor-parallel group, neighbours in a node; 1 for none. Where a group
        is more than an NPU and less than a node, the axis `npu` is split into `group` and `npu`.
    """

    nodes: int
    npus: int = 8
    dies: int = 1
    tensor: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"RankMesh: {field.name} must be an integer of at least 1, got {value!r}"
                )
        check_count("mesh: ranks", self.ranks, most=_MOST_RANKS)
        if self.tensor not in self.tensor_sizes:
            raise ValueError(
                f"RankMesh: tensor must be whole NPUs that divide a node, here one of "
                f"{', '.join(map(str, self.tensor_sizes))}; got {self.tensor}"
            )

    @classmethod
    def parse(cls, text: str) -> "RankMesh":
        """The mesh that a text names: nodes x NPUs, or nodes x NPUs x dies.

            >>> RankMesh.parse("48x8")
            RankMesh(nodes=48, npus=8, dies=1, tensor=1)
            >>> RankMesh.parse("8")                                     # one node
            RankMesh(nodes=1, npus=8, dies=1, tensor=1)

        Raises: ValueError: anything else.
        """
        if not re.fullmatch(r"\d{1,9}(x\d{1,9}){0,2}", text):
            raise ValueError(f"mesh must be NODESxNPUS or NODESxNPUSxDIES, got {text!r}")
        sizes = [int(part) for part in text.split("x")]
        return cls(*(sizes if len(sizes) > 1 else [1, *sizes]))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names to hand to collectives; the tuple enumerates ranks row-major."""
        return tuple(self._sizes)

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        """Sizes that a tensor-parallel group may have: one rank, or whole NPUs that divide a node.

        >>> RankMesh(2, 8, 2).tensor_sizes
        (1, 2, 4, 8, 16)
        """
        npus = (n for n in range(1, self.npus + 1) if self.npus % n == 0)
        return tuple(sorted({1, *(n * self.dies for n in npus)}))

    @property
    def tensor_axes(self) -> tuple[str, ...]:
        """Of `axes`, those that enumerate the ranks of a tensor-parallel group.

        >>> RankMesh(2, 8, 2, tensor=4).axes, RankMesh(2, 8, 2, tensor=4).tensor_axes
        (('node', 'group', 'npu', 'die'), ('npu', 'die'))
        """
        if self.tensor == 1:
            return ()
        inner = ("npu", "die") if self.tensor > self.dies else ("die",)
        return tuple(axis for axis in inner if axis in self._sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of `axes`."""
        return tuple(self._sizes.values())

    @property
    def _sizes(self) -> dict[str, int]:
        """Size of every axis, outermost first."""
        together = max(1, self.tensor // self.dies)  # NPUs of a tensor-parallel group
        split = 1 < together < self.npus
        npus = {"group": self.npus // together, "npu": together} if split else {"npu": self.npus}
        return {"node": self.nodes} | npus | ({"die": self.dies} if self.dies > 1 else {})

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    def abstract(self) -> AbstractMesh:
        """A mesh of all axes without devices: to trace and price on, at any size."""
        return AbstractMesh(self.shape, self.axes, axis_types=(AxisType.Auto,) * len(self.axes))

    def concrete(self) -> Mesh:
        """A mesh of one XLA device per node, axis `"node"`; the other axes are virtual."""
        return _make_mesh((self.nodes,), ("node",))

    def plain(self) -> Mesh:
        """A mesh of one XLA device per *rank*, all axes: to check a program's types."""
        return _make_mesh(self.shape, self.axes)


def prepare_devices(nodes: int) -> None:
    """Start JAX's CPU backend with at least `nodes` devices and patient rendezvous time-outs.

    Call it first thing in a program, before any array is made.

    Raises:
      ValueError: more than 256 devices, or fewer than one.
      RuntimeError: the backend had already started with fewer devices.
    """
    _check_device_count(nodes)
    flags = os.environ.get("XLA_FLAGS", "")
    found = re.search(rf"{_COUNT_FLAG}=(\d+)", flags)
    if found is None:
        flags += f" {_COUNT_FLAG}={nodes}"
    elif int(found[1]) < nodes:
        flags = flags.replace(found[0], f"{_COUNT_FLAG}={nodes}")
    for flag, seconds in _TIMEOUT_FLAGS.items():
        if flag not in flags:
            flags += f" {flag}={seconds}"
    os.environ["XLA_FLAGS"] = flags.strip()
    started = len(jax.devices("cpu"))
    if started < nodes:
        raise RuntimeError(
            f"prepare_devices: the CPU backend already runs with {started} device(s), {nodes} are "
            "needed. Call prepare_devices before the first JAX array or jax.devices(), or start "
            f"Python with XLA_FLAGS={_COUNT_FLAG}={nodes}"
        )


def on_every_rank(
    fn: Callable,
    mesh: RankMesh,
    in_specs: Any,
    out_specs: Any,
    *,
    abstract: bool = False,
    virtual: bool = True,
    checked: bool = True,
) -> Callable:
    """Lift `fn`, a program of one rank, to a function of all ranks' arguments. Jit the result.

    Inside, `fn` may use collectives over `mesh.axes` (all or some). Outside, what is `RANKED` has
    a leading axis of size `mesh.ranks` in rank order (node, npu, die row-major).

    Args:
      fn: per-rank function of positional pytrees.
      mesh: the ranks.
      in_specs: tuple, one pytree prefix of `RANKED` / `REPLICATED` per argument (or one for all).
      out_specs: pytree prefix for the result. `REPLICATED` results are rank 0's.
      abstract: lift onto `mesh.abstract()`: to trace only, nothing can be run.
      virtual: False puts every rank on an XLA device of its own and checks that what is declared
        replicated is (`check_vma=True`); for as many ranks as there are devices.
      checked: False leaves out that check, for programs whose derivatives are written out.
    """
    if abstract or not virtual:
        checked = checked and not abstract
        return _lift_plain(fn, mesh, in_specs, out_specs, abstract=abstract, checked=checked)

    def on_one_node(*args):
        program = fn
        axes = jax.tree.map(lambda spec: 0 if spec is RANKED else None, in_specs)
        for name, size in reversed(list(zip(mesh.axes, mesh.shape, strict=True))[1:]):
            program = jax.vmap(program, in_axes=axes, out_axes=0, axis_name=name, axis_size=size)
        inner = mesh.shape[1:]
        out = program(*_where_ranked(in_specs, args, lambda x: x.reshape(*inner, *x.shape[1:])))
        out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(inner) :]), out)
        return _map_prefix(
            out_specs,
            out,
            lambda spec, x: x if spec is RANKED else jax.lax.index_in_dim(x, 0, 0, False),
        )

    specs = _partition_specs(("node",))

    def lifted(*args):
        _check_leading(in_specs, args, mesh)
        return jax.shard_map(
            on_one_node,
            mesh=mesh.concrete(),
            in_specs=jax.tree.map(specs, in_specs),
            out_specs=jax.tree.map(specs, out_specs),
            check_vma=False,  # JAX cannot type virtual axes; virtual=False is there to check types
        )(*args)

    return lifted


def _lift_plain(fn, mesh, in_specs, out_specs, *, abstract, checked):
    specs = _partition_specs(mesh.axes)

    def on_one_rank(*args):
        out = fn(*_where_ranked(in_specs, args, lambda x: x.reshape(x.shape[1:])))
        return _where_ranked(out_specs, out, lambda x: x.reshape(1, *x.shape))

    def lifted(*args):
        _check_leading(in_specs, args, mesh)
        return jax.shard_map(
            on_one_rank,
            mesh=mesh.abstract() if abstract else mesh.plain(),
            in_specs=jax.tree.map(specs, in_specs),
            out_specs=jax.tree.map(specs, out_specs),
            check_vma=checked,
        )(*args)

    return lifted


def _partition_specs(axes: tuple[str, ...]) -> Callable:
    def of(spec):
        if not isinstance(spec, Spec):
            raise ValueError(f"on_every_rank: a spec must be RANKED or REPLICATED, got {spec!r}")
        return PartitionSpec(axes) if spec is RANKED else PartitionSpec()

    return of


def _map_prefix(specs, tree, change):
    return jax.tree.map(lambda spec, sub: jax.tree.map(lambda x: change(spec, x), sub), specs, tree)


def _where_ranked(specs, tree, change):
    return _map_prefix(specs, tree, lambda spec, x: change(x) if spec is RANKED else x)


def _check_leading(specs, args, mesh):
    def check(spec, x):
        if spec is RANKED and (not x.shape or x.shape[0] != mesh.ranks):
            raise ValueError(
                f"on_every_rank: a RANKED argument needs a leading axis of {mesh.ranks} ranks, "
                f"got shape {x.shape}"
            )

    _map_prefix(specs, args, check)


def _make_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    wanted = math.prod(shape)
    _check_device_count(wanted)
    devices = jax.devices()
    if len(devices) < wanted:
        devices = jax.devices("cpu")
    if len(devices) < wanted:
        raise ValueError(
            f"RankMesh: {'x'.join(map(str, shape))} ({', '.join(names)}) needs {wanted} XLA "
            f"devices, this process has {len(devices)}; call prepare_devices({wanted}) first, or "
            "put more of the ranks in the virtual axes npus and dies"
        )
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices[:wanted]
    )


def _check_device_count(count: int) -> None:
    if not 1 <= count <= XLA_CPU_DEVICE_LIMIT:
        raise ValueError(
            f"devices must be 1 to {XLA_CPU_DEVICE_LIMIT}, got {count}: XLA's CPU collectives can "
            f"deadlock above {XLA_CPU_DEVICE_LIMIT} devices in a process. Put the rest of the "
            "ranks in the virtual axes: RankMesh(nodes, npus, dies) uses one device per node"
        )
