"""Which links a mesh axis lies on: of the peers of a collective, how many sit on which tier.

A program names its mesh axes as it likes. An axis is laid on the machine, in this order, by

1. `tiers`, which says it: `{"model": "node"}`, or `{"model": {"die": 2, "node": 8}}` for an axis
   that spans two tiers;
2. its name, if that is `die` (the dies of an NPU), `npu` or `group` (NPUs of a node, and groups of
   them) or `node` (of the supernode);
3. the machine, if one is given: as JAX numbers devices, row-major, so that the last axis of the
   mesh fills dies first, then the NPUs of a node, then nodes.

A tier is the *link* that two ranks use (`cmjax.hardware.TIERS`): the axis `node` counts nodes, so
its ranks meet on the tier `supernode`.
"""

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from cmjax.hardware import TIERS, Supernode

BY_NAME = {"die": "die", "npu": "node", "group": "node", "node": "supernode"}
"""Axis names that say their tier, as `cmjax.mesh.RankMesh` names them."""

Tiers = Mapping[str, str | Mapping[str, int]]
"""Axis name -> the tier its ranks lie on, or how many of them lie on which."""


class Axes(Mapping[str, int]):
    """Mesh axes in scope, by name: their sizes, and the tiers they lie on. Immutable."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        tiers: Tiers | None = None,
        machine: Supernode | None = None,
    ):
        self._sizes = dict(sizes)
        self.tiers = {name: _checked(name, said) for name, said in (tiers or {}).items()}
        self._machine = machine

    def __getitem__(self, name: str) -> int:
        return self._sizes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def within(self, sizes: Mapping[str, int]) -> "Axes":
        """These axes and those of a mesh inside, which hide outer ones of the same name."""
        kept = {name: size for name, size in self._sizes.items() if name not in sizes}
        return Axes({**kept, **sizes}, self.tiers, self._machine)

    def on_tiers(self, name: str) -> dict[str, int]:
        """Ranks of the axis by tier; their product is its size.

        Raises: ValueError: no such axis, nothing says where it lies, or it does not fit there.
        """
        if name not in self._sizes:
            raise ValueError(f"collective over mesh axis {name!r}, which no shard_map defines")
        if (said := self._said(name)) is not None:
            return said
        if self._machine is None:
            raise ValueError(
                f"collective over mesh axis {name!r}: the fabric knows 'node', 'npu' and 'die'; "
                f"say where this one lies, such as tiers={{{name!r}: 'node'}}, or give a machine"
            )
        return self._packed(self._machine)[name]

    def _said(self, name: str) -> dict[str, int] | None:
        size = self._sizes[name]
        said = self.tiers.get(name, BY_NAME.get(name))
        if said is None:
            return None
        if isinstance(said, str):
            return {said: size}
        if math.prod(said.values()) != size:
            raise ValueError(
                f"tiers: axis {name!r} has {size} ranks, but {dict(said)} makes "
                f"{math.prod(said.values())}"
            )
        return dict(said)

    def _packed(self, machine: Supernode) -> dict[str, dict[str, int]]:
        """Every axis that nothing else places, laid on what the others leave, last one first."""
        counts = machine.dies_per_npu, machine.npus_per_node, machine.nodes
        has: dict[str, int] = dict(zip(TIERS, counts, strict=True))
        free, placed = dict(has), {}
        for name in self._sizes:
            for tier, count in (self._said(name) or {}).items():
                free[tier] = max(1, free[tier] // count)
        for name, size in reversed(self._sizes.items()):
            if self._said(name) is not None:
                continue
            rest, placed[name] = size, {}
            for tier in TIERS:
                count = min(rest, free[tier])
                if rest % count or free[tier] % count:
                    raise ValueError(
                        f"collective over mesh axis {name!r}: its {size} ranks do not lie evenly "
                        f"on {machine.name} ({has['die']} dies an NPU, {has['node']} NPUs a node); "
                        f"say where they lie, such as tiers={{{name!r}: 'node'}}"
                    )
                placed[name][tier], rest, free[tier] = count, rest // count, free[tier] // count
            if rest > 1:
                raise ValueError(
                    f"collective over mesh axis {name!r}: the mesh has more ranks than "
                    f"{machine.name}, which has {machine.ranks}"
                )
        return placed


def ranks_on_tiers(names: str | tuple[str, ...], mesh: Mapping[str, int]) -> dict[str, int]:
    """Ranks of a group over mesh axes `names`, by tier: dies of an NPU, NPUs of a node, nodes.

    Args:
      names: one axis or several.
      mesh: axis sizes; an `Axes` also knows where axes of any name lie.
    Raises: ValueError: an axis that no mesh defines, or of which nothing says where it lies.
    """
    axes = mesh if isinstance(mesh, Axes) else Axes(mesh)
    found: dict[str, int] = dict.fromkeys(TIERS, 1)
    for name in (names,) if isinstance(names, str) else tuple(names):
        for tier, count in axes.on_tiers(name).items():
            found[tier] *= count
    return found


def tier_shares(names, mesh: Mapping[str, int]) -> tuple[int, float, float, float]:
    """How the peers of a collective over mesh axes `names` are spread over the tiers.

    Returns: (ranks in the group, fraction of them on the own NPU's other die, in the own node,
    on other nodes); the rest of the fractions, 1/ranks, is the rank itself.
    Raises: ValueError: as `ranks_on_tiers`.
    """
    on = ranks_on_tiers(names, mesh)
    dies = on["die"]
    in_node = dies * on["node"]
    ranks = in_node * on["supernode"]
    return ranks, (dies - 1) / ranks, (in_node - dies) / ranks, (ranks - in_node) / ranks


def _checked(name: str, said: str | Mapping[str, int]) -> str | Mapping[str, int]:
    for tier in (said,) if isinstance(said, str) else said:
        if tier not in TIERS:
            close = get_close_matches(str(tier), TIERS, n=1) or TIERS
            raise ValueError(
                f"tiers: axis {name!r} cannot lie on {tier!r}; the tiers are "
                f"{', '.join(TIERS)} (closest: {', '.join(close)})"
            )
    if not isinstance(said, str) and any(count < 1 for count in said.values()):
        raise ValueError(f"tiers: axis {name!r} needs whole numbers of ranks, got {dict(said)}")
    return said
