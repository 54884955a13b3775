"""A mixture's parameters as the ranks of a plan hold them, cut from one device's and joined again.

    rank (r, s, e):  layers of stage s, of whose experts e has a part; replica r of that

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
_DIMENSIONS = ("replicas", "pipeline", "expert")


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
    """The mesh axis that every dimension lies on."""
    return dict(zip(_order(plan), ("die", "npu", "node"), strict=True))


def expert_mesh(plan: Plan) -> RankMesh:
    """The plan's ranks, its first dimension closest together."""
    degrees = dimensions(plan)
    dies, npus, nodes = (degrees[name] for name in _order(plan))
    return RankMesh(nodes=nodes, npus=npus, dies=dies)


def replica_of(rank: int, plan: Plan) -> int:
    """Which of the data-parallel replicas a rank is a part of."""
    degrees, place = dimensions(plan), {}
    for name in _order(plan):
        rank, place[name] = divmod(rank, degrees[name])
    return place["replicas"] * plan.expert + place["expert"]


def cut(
    whole: Tree, training: MoETraining, plan: Plan, parallelism: Parallelism, *, words: bool
) -> Parts:
    """One device's parameters as all ranks hold them, before replicas share them: every leaf with
    a leading axis of ranks. `words`: whether the output has a copy of the embedding."""
    spread, p, share = trained(shard_params(whole, parallelism)), plan.pipeline, plan.expert

    def ranked(x: Array) -> Array:  # [stages, experts' ranks, ...] -> [ranks, ...]
        x = jnp.broadcast_to(x, (plan.data // share, *x.shape))
        axes = [_DIMENSIONS.index(name) for name in reversed(_order(plan))]
        return x.transpose(*axes, *range(3, x.ndim)).reshape(plan.devices, *x.shape[3:])

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
        major, degrees = tuple(reversed(_order(plan))), dimensions(plan)
        x = x.reshape(*(degrees[name] for name in major), *x.shape[1:])
        x = x.transpose(*map(major.index, ("pipeline", "expert", "replicas")), *range(3, x.ndim))
        if x.shape[3:] == like.shape:
            x = x[:, :, 0]
            return x if of_experts(path) else x[:, 0]
        if of_experts(path):  # every replica has a part
            return gathered(2, x.reshape(p, share, -1), like)
        return gathered(1, x.swapaxes(1, 2).reshape(p, -1), like)

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
    """Dimensions from neighbours outward; a pipeline of one stage lies outside."""
    names = tuple(dimensions(plan))
    return names if plan.pipeline > 1 else tuple(sorted(names, key="pipeline".__eq__))
