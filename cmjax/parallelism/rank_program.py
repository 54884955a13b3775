"""A rank of a plan: its modules, its place, and what it sends to replicas and other stages.

Parameters that are spread over the replicas (zero3) are gathered as they are used; their gradients
(zero2 too) are summed and spread as they are made, and all others at the end of the step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from cmjax.models.dense import DenseConfig, Recompute
from cmjax.parallelism.backward import Backward, without_unread
from cmjax.parallelism.known import choose, take
from cmjax.parallelism.layerwise import MODES
from cmjax.parallelism.memory import split_of
from cmjax.parallelism.pieces import part_between_layers, run_embedding, run_layer, run_output
from cmjax.parallelism.plan import Plan
from cmjax.parallelism.shards import Graphs, Parts, Tree, axes_of, gathered, graphs, spread
from cmjax.parallelism.staged import Pass, Staged, add_to_layer
from cmjax.primitives.tensor import gather_group, scatter_sum

SUMMED = frozenset({"gain", "shift", "output_bias", "ffn_bias"})
"""Parameters that every tensor-parallel rank holds and that with sequence parallelism it applies to
its own part of the sequence: their gradients are addends."""


class RankProgram(Staged):
    """What a rank of a plan runs, where it stands, and what it exchanges with its like.

    Args:
      plan, model, global_batch: a plan that divides (`Plan.check`).
      dtype: of parameters and activations; gradients are summed in float32.
      virtual: whether axes of the mesh but the first are `jax.vmap`'s.
    """

    def __init__(
        self, plan: Plan, model: DenseConfig, global_batch: int, dtype, *, virtual: bool = False
    ):
        axes = axes_of(plan)
        stage_axis = axes.get("pipeline", "node")
        fill = virtual and stage_axis != "node"
        super().__init__(plan, global_batch, dtype, stage_axis, fill=fill)
        self.model = model
        self.data_axis = tuple(axes[name] for name in ("replicas", "context") if name in axes)
        self.split = split_of(plan)
        for name, field in (("tensor", "axis"), ("context", "context_axis")):
            self.split = dataclasses.replace(self.split, **{field: axes.get(name, "node")})
        self.graphs: Graphs = graphs(model, plan, dtype, self.split)
        self.counts = plan.counts(model.layers)
        self.last = self.counts[-1].layers - 1  # of the last stage's places in a chunk

    @property
    def stream(self) -> jax.ShapeDtypeStruct:
        part = part_between_layers(self.model, self.split)
        shape = self.plan.micro_batch, part, self.model.hidden
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def own_tokens(self, tokens: Array) -> Array:
        if self.split.context == 1:
            return tokens
        part = self.model.sequence // self.split.context
        first = self.split.context_rank * part
        return lax.dynamic_slice_in_dim(tokens, first, part + 1, axis=1)

    @functools.cached_property
    def passes(self) -> list[Pass]:
        modes = [self.modes_of(layer) for layer in range(len(self.graphs.shapes.layers))]
        backward = {mode: self._backward(mode) for layer in modes for mode in layer}
        last = self.last if self.model.query_layer else None
        return [
            Pass(layer, stages, backward[mode], in_output=layer == last)
            for layer, by_mode in enumerate(modes)
            for mode, stages in by_mode.items()
        ]

    def _backward(self, mode: Recompute) -> Backward:
        def layer(p, x):
            return run_layer(mode, self.graphs.layer, nnx.State(p), x)

        apart = self.plan.schedule == "zero_bubble"
        return Backward(layer, self.graphs.one, self.stream, apart=apart)

    def modes_of(self, layer: int) -> dict[Recompute, list[bool]]:
        """What is recomputed of a layer of a chunk, and on which stages, if they have it."""
        stages = [n.mode_of(layer) if layer < n.layers else None for n in self.counts]
        return {mode: [each == mode for each in stages] for mode in MODES if mode in stages}

    @property
    def mode_of_last(self) -> Recompute:
        """What is recomputed of the model's last layer."""
        return self.counts[-1].mode_of(self.last)

    # --- what a stage computes ------------------------------------------------------------------

    def layer(self, params: Parts, part: int, chunk) -> Tree:
        own = jax.tree.map(lambda x: take(x, chunk), params.layers[part])
        return self.whole(0, own, self.graphs.one)

    def embed(self, params: Parts, tokens) -> Array:
        return run_embedding(self.graphs.embedding, nnx.State(self._embedding(params)), tokens)

    def end(self, params: Parts, y: Array, tokens, scale: float, chunk) -> tuple[Array, Array, Any]:
        """Its gradients are of the output, of the query layer if there is one, and of the words."""
        output = self.whole(0, params.output, self.graphs.shapes.output)
        if words_apart(self):
            words, output = output["words"], {k: x for k, x in output.items() if k != "words"}
        else:
            name = {"words": params.embedding["words"]}
            like = {"words": self.graphs.shapes.embedding["words"]}
            words = self.whole(0, name, like)["words"]
        query = self.layer(params, self.last, chunk) if self.model.query_layer else None

        def loss(output, query, words, y):
            state = nnx.State(output if query is None else {**output, "query": query})
            run = functools.partial(run_output, self.model, self.mode_of_last, self.graphs.output)
            return run(state, y, words, tokens)

        found, back = jax.vjp(loss, output, query, words, y)
        *sums, g = back(jnp.asarray(scale, found.dtype))
        return found.astype(jnp.float32), g, [None if d is None else self._sums(d) for d in sums]

    def add_end(self, grads: Parts, sums: Any, chunk) -> Parts:
        output, query, words = sums
        if query is not None:
            grads = add_to_layer(grads, self.last, chunk, query)
        embedding = dict(grads.embedding)
        if words_apart(self):
            output = {**output, "words": words}
        else:
            embedding["words"] = embedding["words"] + words
        output = jax.tree.map(jnp.add, grads.output, output)
        return dataclasses.replace(grads, embedding=embedding, output=output)

    def embedding_sums(self, params: Parts, tokens, g: Array) -> Tree:
        def backward(params, tokens, g):
            run = functools.partial(run_embedding, self.graphs.embedding)
            return jax.vjp(lambda p: run(nnx.State(p), tokens), params)[1](g)[0]

        return self._sums(without_unread(backward, self._embedding(params), tokens, g))

    def layer_sums(self, d: Tree) -> Tree:
        return self._sums(d)

    def zeros(self, params: Parts) -> Parts:
        plan = self.plan

        def sums(lead: int, x):
            if plan.optimizer in ("zero2", "zero3"):
                size = -(-math.prod(x.shape[lead:]) // plan.data)
                if plan.optimizer == "zero3":
                    size = x.shape[-1]
                return jnp.zeros((*x.shape[:lead], size), jnp.float32)
            return jnp.zeros(x.shape, jnp.float32)

        return params.map(sums)

    def pass_on(self, x: Array, pairs: list[tuple[int, int]], here) -> Array:
        """Ranks of a tensor-parallel group hold the same: each sends its part to its own peer, and
        they gather it there (arXiv 2104.04473, section 4.1)."""
        split = self.split
        if split.ranks == 1 or split.sequence:
            return self.send(x, pairs)
        width = x.shape[-1] // split.ranks
        part = lax.dynamic_slice_in_dim(x, split.rank * width, width, axis=2)
        part = self.send(part, pairs)
        return choose(here, lambda: lax.all_gather(part, split.axis, axis=2, tiled=True))

    def _embedding(self, params: Parts) -> Tree:
        return self.whole(0, params.embedding, self.graphs.shapes.embedding)

    def _sums(self, d: Tree) -> Tree:
        """Gradients of a micro-batch as they are added up."""
        if self.plan.optimizer in ("zero2", "zero3"):
            return self.over_replicas(d, 0)
        return jax.tree.map(lambda g: g.astype(jnp.float32), d)

    # --- what ranks exchange --------------------------------------------------------------------

    def reduced(self, grads: Parts) -> Parts:
        plan = self.plan
        if plan.optimizer in ("none", "zero1"):
            grads = Parts(
                layers=self.where_they_are(lambda x: self.over_replicas(x, 1), grads.layers),
                embedding=self.at_stage(0, lambda x: self.over_replicas(x, 0), grads.embedding),
                output=self.at_stage(-1, lambda x: self.over_replicas(x, 0), grads.output),
            )
        if self.split.sequence:
            grads = Parts(
                layers=self.where_they_are(self._sum_copies, grads.layers),
                embedding=grads.embedding,
                output=self.at_stage(-1, self._sum_copies, grads.output),
            )
        if plan.pipeline > 1 and self.model.tied:
            grads = self.words_of_both_ends(grads, "words")
        return grads

    def where_they_are(self, change: Callable, layers: Sequence[Tree]) -> tuple[Tree, ...]:
        """`change(layer)` of every place for a layer, on the stages that have one there."""
        return tuple(
            self.at_stages([place < n.layers for n in self.counts], change, layer)
            for place, layer in enumerate(layers)
        )

    def over_replicas(self, grads: Tree, lead: int) -> Tree:
        """Sums over the replicas, spread over them with any optimizer but "none"."""
        return jax.tree.map(functools.partial(self._over_replicas, lead), grads)

    def _over_replicas(self, lead: int, g: Array) -> Array:
        if self.plan.data == 1:
            return g if self.plan.optimizer == "none" else spread(lead, g, 1)
        g = g.astype(self.dtype)
        if self.plan.optimizer == "none":
            return lax.psum(g, self.data_axis).astype(jnp.float32)
        g = spread(lead, g, self.plan.data)
        g = scatter_sum(g.swapaxes(0, lead), self.data_axis).swapaxes(0, lead)
        return g.astype(jnp.float32)

    def _sum_copies(self, grads: Tree) -> Tree:
        def one(path, g):
            if name_of(path) not in SUMMED:
                return g
            return lax.psum(g.astype(self.dtype), self.split.axis).astype(jnp.float32)

        return jax.tree_util.tree_map_with_path(one, grads)

    def whole(self, lead: int, params: Tree, shapes: Tree) -> Tree:
        """Parameters as the modules take them: gathered, if the replicas share them."""
        if self.plan.optimizer != "zero3":
            return params

        return jax.tree.map(functools.partial(self.of_replicas, lead), params, shapes)

    def of_replicas(self, lead: int, x: Array, like) -> Array:
        """All of a leaf of which the replicas have parts; `like` has its shape behind `lead`."""
        if self.plan.data > 1:
            x = gather_group(x.swapaxes(0, lead), self.data_axis).swapaxes(0, lead)
        return gathered(lead, x, like)


def name_of(path) -> str:
    """The name of a leaf's parameter."""
    return str(next(k.key for k in reversed(path) if isinstance(getattr(k, "key", None), str)))


def words_apart(program: RankProgram) -> bool:
    """Whether the output's words are not the embedding's own array."""
    return "words" in program.graphs.shapes.output
