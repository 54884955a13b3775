"""A mixture's parameters as the ranks of a plan hold them, cut from one device's and joined again.

    rank (r, s, e):  layers of stage s, of whose experts e has a part; replica r of that

Ranks that share sequences are some of those that share experts, or, where each has all of them,
replicas.

A layer's place on a stage may hold another kind of layer on another stage: every stage has room for
the kinds that any of them has there (`LayerPart`), and what it never runs is of no meaning.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cmjax.mesh import RankMesh
from cmjax.models.moe.config import LayerKind
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import shard_params
from cmjax.models.moe.trained import trained
from cmjax.parallelism.expert_pieces import MoETraining, dimensions
from cmjax.parallelism.expert_program import of_experts
from cmjax.parallelism.plan import Plan
from cmjax.parallelism.shards import Parts, Tree, gathered

EMBEDDING = "embed"
_DIMENSIONS = ("replicas", "pipeline", "expert", "context")


@dataclasses.dataclass(frozen=True)
class LayerPart:
    """A layer's place on a stage, for one kind.

    Fields:
      kind: dense or with experts.
      numbers: for every stage, the layer's number among those of its kind; `None` where the stage
        has none there, or one of another kind.
    """

    kind: LayerKind
    numbers: tuple[int | None, ...]

    @property
    def stages(self) -> list[bool]:
        """Which stages have one."""
        return [number is not None for number in self.numbers]


def layer_parts(training: MoETraining, plan: Plan) -> list[LayerPart]:
    """The places of a stage in order, each for every kind that a stage has there."""
    model, stages, parts = training.model, training.stages(plan), []
    for place in range(max(map(len, stages))):
        found: dict[LayerKind, list[int | None]] = {}
        for stage, layers in enumerate(stages):
            if place < len(layers):
                kind = model.kind(layers[place])
                before = [model.kind(layer) for layer in range(layers[place])]
                found.setdefault(kind, [None] * plan.pipeline)[stage] = before.count(kind)
        parts += [LayerPart(kind, tuple(numbers)) for kind, numbers in found.items()]
    return parts


def expert_axes(plan: Plan) -> dict[str, str]:
    """The mesh axis that every dimension lies on; what is not split may lie on none.

    Raises: ValueError: four of them are split.
    """
    return dict(zip(_order(plan), ("die", "npu", "node"), strict=True))


def group_axes(plan: Plan) -> tuple[str, ...]:
    """Those that enumerate the ranks which share experts or sequences."""
    axes, degrees = expert_axes(plan), dimensions(plan)
    return tuple(axes[name] for name in ("expert", "context") if degrees.get(name, 1) > 1)


def expert_mesh(plan: Plan) -> RankMesh:
    """The plan's ranks, its first dimension closest together."""
    degrees = dimensions(plan)
    dies, npus, nodes = (degrees[name] for name in _order(plan))
    return RankMesh(nodes=nodes, npus=npus, dies=dies)


def replica_of(rank: int, plan: Plan) -> int:
    """Which of the replicas that have sequences of their own a rank is a part of."""
    degrees, place = dimensions(plan), {}
    for name in _order(plan):
        rank, place[name] = divmod(rank, degrees[name])
    group = place.get("expert", 0) * plan.context + place.get("context", 0)
    return (place["replicas"] * max(plan.expert, plan.context) + group) // plan.context


def cut(
    whole: Tree, training: MoETraining, plan: Plan, parallelism: Parallelism, *, words: bool
) -> Parts:
    """One device's parameters as all ranks hold them, before replicas share them: every leaf with
    a leading axis of ranks. `words`: whether the output has a copy of the embedding."""
    spread, p, share = trained(shard_params(whole, parallelism)), plan.pipeline, plan.expert

    def ranked(x: Array) -> Array:  # [stages, experts' ranks, ...] -> [ranks, ...]
        rest, group = x.shape[2:], max(share, plan.context)
        x = jnp.broadcast_to(x, (p, group, *rest))
        x = x.reshape(p, group // plan.context, plan.context, *rest)
        x = jnp.broadcast_to(x, (plan.data // group, *x.shape))
        axes = [_DIMENSIONS.index(name) for name in _major(plan)]
        return x.transpose(*axes, *range(4, x.ndim)).reshape(plan.devices, *rest)

    def layer(part: LayerPart) -> Tree:
        numbers = jnp.asarray([number or 0 for number in part.numbers])

        def one(path, x):
            if of_experts(path):  # [share, layers, ...]
                x = jnp.swapaxes(x[:, numbers], 0, 1)
            else:
                x = jnp.broadcast_to(x[numbers][:, None], (p, share, *x.shape[1:]))
            return ranked(x[:, :, None])  # one chunk

        return jax.tree_util.tree_map_with_path(one, spread[part.kind]["layers"])

    def end(names: Sequence[str]) -> Tree:
        def one(x):
            return ranked(jnp.broadcast_to(x, (p, share, *x.shape)))

        return jax.tree.map(one, {name: spread[name] for name in names})

    at_end = [name for name in spread if name not in (EMBEDDING, *training.layers)]
    return Parts(
        layers=tuple(map(layer, layer_parts(training, plan))),
        embedding=end([EMBEDDING]),
        output=end([*at_end, *[EMBEDDING] * words]),
    )


def join(parts: Parts, training: MoETraining, plan: Plan, shapes: Parts) -> Tree:
    """The inverse of `cut`, of trained leaves, which replicas may share; `None` for tables.

    Args: shapes: of a rank's parameters, before replicas share them, without a chunk.
    """
    p, share = plan.pipeline, plan.expert

    def own(path, like, x) -> Array:
        """[stages, (experts' ranks,) ...], of a leaf with a leading axis of ranks."""
        major, degrees = _major(plan), dimensions(plan)
        x = x.reshape(*(degrees.get(name, 1) for name in major), *x.shape[1:])
        inner = ("pipeline", "expert", "context", "replicas")
        x = x.transpose(*map(major.index, inner), *range(4, x.ndim))
        x = x.reshape(p, -1, *x.shape[3:])  # [stages, experts' or sequences' ranks, replicas, ...]
        if x.shape[3:] == like.shape:
            x = x[:, :, 0]
            return x[:, :share] if of_experts(path) else x[:, 0]
        if of_experts(path) and share > 1:  # every replica has a part
            return gathered(2, x.reshape(p, share, -1), like)
        x = gathered(1, x.swapaxes(1, 2).reshape(p, -1), like)
        return x[:, None] if of_experts(path) else x

    layers: dict[str, dict[int, Tree]] = {kind: {} for kind in training.layers}
    places = layer_parts(training, plan)
    for place, tree, like in zip(places, parts.layers, shapes.layers, strict=True):
        found = jax.tree_util.tree_map_with_path(lambda q, s, x: own(q, s, x[:, 0]), like, tree)
        for stage, number in enumerate(place.numbers):
            if number is not None:
                layers[place.kind][number] = jax.tree.map(lambda x, s=stage: x[s], found)

    def stacked(path, *xs) -> Array:
        x = jnp.stack(xs)  # [layers, (share, slots,) ...]
        return x.reshape(len(xs), -1, *x.shape[3:]) if of_experts(path) else x

    whole: Tree = {}
    for kind, numbered in layers.items():
        trees = [numbered[number] for number in sorted(numbered)]
        whole[kind] = {"layers": jax.tree_util.tree_map_with_path(stacked, *trees)}
    for tree, like, stage in ((parts.output, shapes.output, -1),
                              (parts.embedding, shapes.embedding, 0)):  # fmt: skip
        whole |= jax.tree_util.tree_map_with_path(
            lambda q, s, x, stage=stage: own(q, s, x)[stage], like, tree
        )
    return {name: whole[name] for name in sorted(whole)}


def _order(plan: Plan) -> tuple[str, ...]:
    """Three dimensions from neighbours outward; a pipeline of one stage lies outside."""
    degrees = dimensions(plan)
    names = tuple(degrees)
    names = names if plan.pipeline > 1 else tuple(sorted(names, key="pipeline".__eq__))
    if len(names) == 3:
        return names
    left_out = next((name for name in ("expert", "pipeline") if degrees[name] == 1), None)
    if left_out is None:
        raise ValueError(
            "plan: three dimensions can be split where a plan is executed; of pipeline and the "
            "expert / context ranks one must be 1"
        )
    return tuple(name for name in names if name != left_out)


def _major(plan: Plan) -> tuple[str, ...]:
    """All dimensions from the one that lies outside inward; those that are not split come last."""
    order = _order(plan)[::-1]
    return (*order, *(name for name in _DIMENSIONS if name not in order))
