"""A model's parameters as the ranks of a plan hold them, cut from one device's and joined again.

    rank (d, s, t):  layers of stage s, columns and rows of tensor rank t; with a spread optimizer
                     also its 1/D of every layer's elements, d = 0 ... D-1

Every stage has both ends of the model, and room for as many layers as any has, since one program
runs on all of them; the first stage's embedding and the last one's output are those that count, and
what a stage never runs is of no meaning.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from cmjax.mesh import RankMesh
from cmjax.models.dense import Block, DenseConfig, DenseModel, Embedding, Output, TensorSplit
from cmjax.models.dense.model import own_words
from cmjax.parallelism.plan import Plan

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """What a rank holds of something that every parameter has: its value, its gradient, a moment.

    Fields:
      layers: a tree for every layer of a chunk; its leaves have a leading axis of chunks.
      embedding, output: of the model's ends; the output has a copy of the words, but where one
        stage has both ends of tied ones.
    """

    layers: tuple[Tree, ...]
    embedding: Tree
    output: Tree

    def map(self, change: Callable, *others: "Parts") -> "Parts":
        """`change(lead, leaf, *leaves)` of all leaves; `lead` axes of a leaf count chunks."""
        parts = {}
        for name, lead in _LEADS.items():
            trees = [getattr(part, name) for part in (self, *others)]
            parts[name] = jax.tree.map(lambda *leaves, lead=lead: change(lead, *leaves), *trees)
        return Parts(**parts)


_LEADS = {"layers": 1, "embedding": 0, "output": 0}


@dataclasses.dataclass(frozen=True)
class Graphs:
    """The modules of one tensor-parallel rank without their parameters, and their shapes."""

    layer: Any
    embedding: Any
    output: Any
    shapes: Parts

    @property
    def one(self) -> Tree:
        """Shapes of a layer."""
        return self.shapes.layers[0]


def graphs(model: DenseConfig, plan: Plan, dtype, split: TensorSplit) -> Graphs:
    """What a rank runs; `shapes` are those of one layer and of the ends."""

    def abstract(kind, config):
        made = nnx.eval_shape(lambda: kind(config, split, dtype=dtype, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(made)
        return graph, nnx.to_pure_dict(state)

    layer, layers = abstract(Block, model)
    embedding, embeddings = abstract(Embedding, model)
    output, outputs = abstract(Output, model)
    outputs = {name: tree for name, tree in outputs.items() if name != "query"}
    if copies_words(model, plan):
        words = own_words(model, split), model.hidden
        outputs["words"] = jax.ShapeDtypeStruct(words, dtype)
    number = max(plan.stages(model.layers))
    return Graphs(layer, embedding, output, Parts((layers,) * number, embeddings, outputs))


def layer_numbers(model: DenseConfig, plan: Plan) -> np.ndarray:
    """The model's layers by [stage, place in a chunk, chunk]; -1 where a stage has none there."""
    stages = plan.stages(model.layers)
    found = np.full((plan.pipeline, max(stages), plan.interleave), -1)
    first = np.arange(plan.interleave) * sum(stages)  # of every chunk
    for stage, number in enumerate(stages):
        found[stage, :number] = first + np.arange(number)[:, None]
        first = first + number
    return found


def copies_words(model: DenseConfig, plan: Plan) -> bool:
    """Whether the output has words of its own."""
    return plan.pipeline > 1 or not model.tied


def mesh_of(plan: Plan) -> RankMesh:
    """The plan's ranks, its first dimension closest together: dies of an NPU, NPUs of a node."""
    dies, npus, nodes = (degree for _, degree in _dimensions(plan))
    return RankMesh(nodes=nodes, npus=npus, dies=dies)


def axes_of(plan: Plan) -> dict[str, str]:
    """The mesh axis that every dimension lies on; of the data-parallel ranks, those of `replicas`
    and those of the `context`. What is not split may lie on none."""
    return dict(zip((name for name, _ in _dimensions(plan)), ("die", "npu", "node"), strict=True))


def _dimensions(plan: Plan) -> list[tuple[str, int]]:
    """Three dimensions and their degrees, from neighbours outward.

    Raises: ValueError: four of them are split.
    """
    degrees = {}
    for name in plan.order:
        inner = ("context", "replicas") if name == "data" else (name,)
        degrees |= {each: getattr(plan, each) for each in inner}
    if plan.context == 1:
        del degrees["context"]
    elif (one := next((name for name, degree in degrees.items() if degree == 1), None)) is None:
        raise ValueError(
            "plan: three dimensions can be split where a plan is executed; of tensor, pipeline, "
            "context and the data / context replicas one must be 1"
        )
    else:
        del degrees[one]
    return list(degrees.items())


def place_of(rank: int, plan: Plan) -> dict[str, int]:
    """A rank's position in every dimension."""
    place = {}
    for name in plan.order:
        rank, place[name] = divmod(rank, getattr(plan, name))
    return place


def cut(whole: Tree, model: DenseConfig, plan: Plan, shapes: Parts) -> Parts:
    """One device's tree of parameters (`nnx.to_pure_dict` of a `DenseModel`) as all ranks hold it:
    every leaf with a leading axis of ranks. Leaves are not yet spread over the replicas."""
    p, numbers = plan.pipeline, np.maximum(layer_numbers(model, plan), 0)
    layers = jax.tree.map(lambda x: x[numbers], _all_layers(whole, model))
    output = {name: tree for name, tree in whole["output"].items() if name != "query"}
    if copies_words(model, plan):
        output["words"] = whole["embedding"]["words"] if model.tied else whole["words"]
    places = range(numbers.shape[1])
    by_layer = tuple(jax.tree.map(lambda x, i=i: x[:, i], layers) for i in places)
    whole_parts = Parts(by_layer, whole["embedding"], output)

    def ranks(lead: int, own, x) -> Array:
        stages = x if lead else jnp.broadcast_to(x, (p, *x.shape))
        begin = 1 + lead
        axis = split_axis(x.shape[begin if lead else 0 :], own.shape)
        if axis is None:
            parts = jnp.broadcast_to(stages[:, None], (p, plan.tensor, *stages.shape[1:]))
        else:
            axis, size = axis + begin, own.shape[axis] * plan.tensor
            padding = [(0, 0)] * stages.ndim
            padding[axis] = (0, size - stages.shape[axis])
            parts = jnp.stack(jnp.split(jnp.pad(stages, padding), plan.tensor, axis), 1)
        return in_rank_order(jnp.broadcast_to(parts, (plan.data, *parts.shape)), plan)

    return shapes.map(ranks, whole_parts)


def join(parts: Parts, model: DenseConfig, plan: Plan, shapes: Parts) -> Tree:
    """The inverse of `cut`; leaves may be spread over the replicas (`spread`)."""
    p = plan.pipeline
    dims = [plan.data, p, plan.tensor]

    def one(lead: int, own, x) -> Array:
        x = in_dimension_order(x, plan)  # [data, stage, tensor, lead..., ...]
        counts = x.shape[3 : 3 + lead]
        if x.shape[3 + lead :] != own.shape:  # every replica has a part
            size = math.prod(own.shape)
            x = jnp.moveaxis(x, 0, 2 + lead).reshape(*dims[1:], *counts, -1)
            x = x[..., :size].reshape(*dims[1:], *counts, *own.shape)
        else:
            x = x[0]
        return x

    cut_parts = shapes.map(one, parts)
    whole_shapes = nnx.to_pure_dict(
        nnx.split(nnx.eval_shape(lambda: DenseModel(model, rngs=nnx.Rngs(0))))[1]
    )

    def tensor(x, own_shape, whole_shape, lead):
        axis = split_axis(whole_shape, own_shape)
        if axis is None:
            return x[0]
        x = jnp.concatenate(list(x), axis=axis + lead)
        return jax.lax.slice_in_dim(x, 0, whole_shape[axis], axis=axis + lead)

    one_layer = nnx.to_pure_dict(nnx.split(_whole_layer(model))[1])
    by_layer = [
        jax.tree.map(
            lambda x, own, like: jnp.stack(
                [tensor(x[s], own.shape, like.shape, 1) for s in range(p)]
            ),
            layer, shapes.layers[0], one_layer,
        )
        for layer in cut_parts.layers
    ]  # fmt: skip
    layers = jax.tree.map(lambda *xs: jnp.stack(xs, 1), *by_layer)
    numbers = layer_numbers(model, plan)
    at = np.unravel_index(np.argsort(numbers, axis=None)[-model.layers :], numbers.shape)
    layers = jax.tree.map(lambda x: x[at], layers)  # [stage, place, chunk, ...] -> [layers, ...]
    whole: Tree = {}
    if model.blocks:
        whole["blocks"] = jax.tree.map(lambda x: x[: model.blocks], layers)
    for name, stage in (("embedding", 0), ("output", p - 1)):
        like = {k: tree for k, tree in whole_shapes[name].items() if k != "query"}
        own = getattr(shapes, name)
        found = {k: tree for k, tree in getattr(cut_parts, name).items() if k in like}
        whole[name] = jax.tree.map(
            lambda x, own, like, stage=stage: tensor(x[stage], own.shape, like.shape, 0),
            found, {k: own[k] for k in like}, like,
        )  # fmt: skip
    if model.query_layer:
        whole["output"]["query"] = jax.tree.map(lambda x: x[-1], layers)
    if not model.tied:
        words, like = cut_parts.output["words"][p - 1], whole_shapes["words"]
        whole["words"] = tensor(words, shapes.output["words"].shape, like.shape, 0)
    return whole


def in_rank_order(x: Array, plan: Plan) -> Array:
    """[data, pipeline, tensor, ...] -> [ranks, ...]."""
    axes = [("data", "pipeline", "tensor").index(name) for name in reversed(plan.order)]
    x = x.transpose(*axes, *range(3, x.ndim))
    return x.reshape(plan.devices, *x.shape[3:])


def in_dimension_order(x: Array, plan: Plan) -> Array:
    """[ranks, ...] -> [data, pipeline, tensor, ...]."""
    major = tuple(reversed(plan.order))
    x = x.reshape(*(getattr(plan, name) for name in major), *x.shape[1:])
    return x.transpose(*(major.index(n) for n in ("data", "pipeline", "tensor")), *range(3, x.ndim))


def spread(lead: int, x: Array, replicas: int) -> Array:
    """The elements of a leaf behind its leading axes in a row, a multiple of `replicas` of them."""
    flat = x.reshape(*x.shape[:lead], -1)
    missing = -flat.shape[-1] % replicas
    return jnp.pad(flat, [(0, 0)] * lead + [(0, missing)]) if missing else flat


def gathered(lead: int, x: Array, like) -> Array:
    """The inverse of `spread`."""
    size = math.prod(like.shape)
    return x[..., :size].reshape(*x.shape[:lead], *like.shape)


def split_axis(whole: tuple[int, ...], own: tuple[int, ...]) -> int | None:
    """The axis that tensor-parallel ranks share; `None` for what all of them hold."""
    return next((i for i, (a, b) in enumerate(zip(whole, own, strict=True)) if a != b), None)


def _all_layers(whole: Tree, model: DenseConfig) -> Tree:
    """All layers, the query layer last, with a leading axis."""
    query = whole["output"].get("query") if model.query_layer else None
    if query is None:
        return whole["blocks"]
    if not model.blocks:
        return jax.tree.map(lambda x: x[None], query)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), whole["blocks"], query)


def _whole_layer(model: DenseConfig):
    return nnx.eval_shape(lambda: Block(model, TensorSplit(), dtype=jnp.float32, rngs=nnx.Rngs(0)))
