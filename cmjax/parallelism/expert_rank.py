"""A rank of a plan of a mixture of experts: its modules, its place, and what it exchanges.

What the replicas of a parameter are, is a matter of its path: routed experts have as many as groups
of ranks that share them, everything else has one on every rank of the stage. Parameters that are
spread over them (zero3) are gathered as they are used; their gradients (zero2 too) are summed and
spread as they are made, all others at the end of the step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.balancing import is_load
from cmjax.models.moe.config import LayerKind
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.trained import trained, with_tables
from cmjax.parallelism.backward import Backward
from cmjax.parallelism.expert_pieces import MoETraining
from cmjax.parallelism.expert_program import EndsProgram, LayerProgram, of_experts
from cmjax.parallelism.expert_shards import EMBEDDING, expert_axes, group_axes, layer_parts
from cmjax.parallelism.known import take
from cmjax.parallelism.plan import Plan
from cmjax.parallelism.shards import Parts, Tree, gathered, spread
from cmjax.parallelism.staged import Pass, Staged
from cmjax.primitives.tensor import gather_group, scatter_sum


class ExpertRank(Staged):
    """What a rank of a plan runs, where it stands, and what it exchanges with its like.

    Args:
      plan, training, global_batch: a plan that divides (`MoETraining.check`).
      arithmetic: of the model; parameters and gradients are exchanged in its precision.
      parallelism: of a layer's experts.
      virtual: whether axes of the mesh but the first are `jax.vmap`'s.
    """

    def __init__(
        self,
        plan: Plan,
        training: MoETraining,
        global_batch: int,
        arithmetic: Arithmetic,
        parallelism: Parallelism,
        *,
        virtual: bool,
    ):
        axes = expert_axes(plan)
        stages = axes.get("pipeline", "")  # of one stage it may lie on none
        fill = virtual and stages != "node"
        super().__init__(plan, global_batch, arithmetic.dtype, stages, fill=fill)
        model, self.training = training.model, training
        self.replicas, self.group = axes["replicas"], group_axes(plan)
        self.parallelism = parallelism
        self.copies_words = plan.pipeline > 1 and model.tie_embeddings
        self.parts = layer_parts(training, plan)
        self.ends = EndsProgram(model, arithmetic)
        self.layers: dict[LayerKind, LayerProgram] = {
            kind: LayerProgram(model, parallelism, kind, plan.recompute_of_all, arithmetic)
            for kind in training.layers
        }
        slots, copies = parallelism.table.arrays()
        self._tables = {"slots_of_expert": slots, "copies": copies}

    @functools.cached_property
    def shapes(self) -> Parts:
        """Of a rank's parameters, before replicas share them, without an axis of chunks."""
        ends = jax.tree_util.tree_map_with_path(self._as_held, self.ends.shapes)
        at_end = [name for name in ends if name != EMBEDDING or self.copies_words]
        return Parts(
            layers=tuple(self._shapes_of(part.kind) for part in self.parts),
            embedding={EMBEDDING: ends[EMBEDDING]},
            output={name: ends[name] for name in at_end},
        )

    def _shapes_of(self, kind: LayerKind) -> Tree:
        return jax.tree_util.tree_map_with_path(self._as_held, trained(self.layers[kind].shapes))

    def _as_held(self, path, like) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype if is_load(path) else self.dtype)

    @property
    def stream(self) -> jax.ShapeDtypeStruct:
        part = self.training.sequence // self.plan.context
        shape = self.plan.micro_batch, part, self.training.model.hidden_size
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def own_tokens(self, tokens: Array) -> Array:
        if self.plan.context == 1:
            return tokens
        part = self.training.sequence // self.plan.context
        first = self.parallelism.positions(part)[0]
        return lax.dynamic_slice_in_dim(tokens, first, part + 1, axis=1)

    @functools.cached_property
    def passes(self) -> list[Pass]:
        backward = {kind: self._backward(kind) for kind in self.layers}
        return [Pass(i, part.stages, backward[part.kind]) for i, part in enumerate(self.parts)]

    def _backward(self, kind: LayerKind) -> Backward:
        program = self.layers[kind]
        tables = jax.tree_util.tree_map_with_path(
            lambda path, _: self._tables.get(path[-1].key), program.shapes
        )
        return Backward(
            lambda params, x: program(with_tables(params, tables), x),
            self._shapes_of(kind),
            self.stream,
            apart=self.plan.schedule == "zero_bubble",
        )

    # --- what a stage computes ------------------------------------------------------------------

    def layer(self, params: Parts, part: int, chunk) -> Tree:
        own = jax.tree.map(lambda x: take(x, chunk), params.layers[part])
        return self._used(own, self.shapes.layers[part])

    def embed(self, params: Parts, tokens) -> Array:
        return self.ends.embed(self._used(params.embedding, self.shapes.embedding), tokens)

    def end(self, params: Parts, y: Array, tokens, scale: float, chunk) -> tuple[Array, Array, Any]:
        """Its gradients are of the output and, where that reads the embedding, of the words."""
        del chunk
        output = self._used(params.output, self.shapes.output)
        words = params.embedding
        if shared := self._reads_embedding:
            words = self._used(words, self.shapes.embedding)

        def loss(output, words, y):
            return self.ends.loss({**words, **output}, y, tokens)

        found, back = jax.vjp(loss, output, words, y)
        d_output, d_words, g = back(jnp.asarray(scale, found.dtype))
        sums = self.layer_sums(d_output), self.layer_sums(d_words) if shared else None
        return found.astype(jnp.float32), g, sums

    def add_end(self, grads: Parts, sums: Any, chunk) -> Parts:
        del chunk
        output, words = sums
        embedding = grads.embedding
        if words is not None:
            embedding = jax.tree.map(jnp.add, embedding, words)
        return Parts(grads.layers, embedding, jax.tree.map(jnp.add, grads.output, output))

    @property
    def _reads_embedding(self) -> bool:
        return self.training.model.tie_embeddings and not self.copies_words

    def embedding_sums(self, params: Parts, tokens, g: Array) -> Tree:
        del params  # a look-up is linear in them
        like = self.shapes.embedding
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
        return self.layer_sums(jax.vjp(lambda p: self.ends.embed(p, tokens), zeros)[1](g)[0])

    def layer_sums(self, d: Tree) -> Tree:
        def one(path, g):
            return self._summed(path, g) if self._early(path) else g.astype(jnp.float32)

        return jax.tree_util.tree_map_with_path(one, d)

    def zeros(self, params: Parts) -> Parts:
        like = self.own(params) if self.plan.optimizer == "zero2" else params
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)

    # --- what ranks exchange --------------------------------------------------------------------

    def reduced(self, grads: Parts) -> Parts:
        def rest(path, _, g):
            return g if self._early(path) else self._summed(path, g)

        grads = self._of_stages(rest, grads)
        return self.words_of_both_ends(grads, EMBEDDING) if self.copies_words else grads

    def gathered(self, params: Parts) -> Parts:
        """What all ranks of a stage hold, of what replicas have parts of."""

        def one(path, like, x):
            return self._gathered(path, like, x) if self.spreads(path) else x

        return self._of_stages(one, params)

    def _of_stages(self, change: Callable[..., Array], parts: Parts) -> Parts:
        """`change(path, shape, leaf)` of what this rank's stage has; zero elsewhere."""

        def some(stages, like: Tree, tree: Tree, change=change) -> Tree:
            def here(tree):
                return jax.tree_util.tree_map_with_path(change, like, tree)

            return self.at_stages(stages, here, tree)

        def of_chunk(path, like, x):
            return change(path, like, x[0])[None]

        first, shapes = [stage == 0 for stage in range(self.plan.pipeline)], self.shapes
        layers = zip(self.parts, shapes.layers, parts.layers, strict=True)
        return Parts(
            layers=tuple(some(part.stages, like, x, of_chunk) for part, like, x in layers),
            embedding=some(first, shapes.embedding, parts.embedding),
            output=some(first[::-1], shapes.output, parts.output),
        )

    def own(self, params: Parts) -> Parts:
        """What the optimizer of a rank works on, in float32."""

        def part(path, x):
            x = x.astype(jnp.float32)
            if not self.spreads(path):
                return x
            x = spread(0, x, self.copies(path))
            size = len(x) // self.copies(path)
            return lax.dynamic_slice_in_dim(x, lax.axis_index(self._axes(path)) * size, size)

        def of_chunk(path, x):
            return part(path, x[0])[None]

        over = jax.tree_util.tree_map_with_path
        return Parts(
            layers=over(of_chunk, params.layers),
            embedding=over(part, params.embedding),
            output=over(part, params.output),
        )

    def square(self, grads: Parts) -> Array:
        """The squares of this rank's gradients, each element counted once over all ranks."""

        def total(tree) -> Array:
            found = jnp.zeros(())
            for path, g in jax.tree_util.tree_leaves_with_path(tree):
                held = 1 if self.spreads(path) else self.copies(path)
                found += 0.0 if is_load(path) else jnp.sum(g * g) / held
            return found

        # Copies of words at the end are counted with the embedding.
        output = {name: x for name, x in grads.output.items() if name != EMBEDDING}
        first, last = self.stage == 0, self.stage == self.plan.pipeline - 1
        ends = total(grads.embedding) * jnp.asarray(first) + total(output) * jnp.asarray(last)
        return total(grads.layers) + ends

    def spreads(self, path) -> bool:
        """Whether the replicas of a parameter share its optimizer's state."""
        return self.plan.optimizer != "none" and not is_load(path)

    def copies(self, path) -> int:
        """Ranks that hold the same of a parameter."""
        return self.plan.data // (self.plan.expert if of_experts(path) else 1)

    def _early(self, path) -> bool:
        """Whether gradients are reduced as they are made, and nobody holds all of them."""
        return self.plan.optimizer in ("zero2", "zero3") and not is_load(path)

    def _axes(self, path) -> tuple[str, ...]:
        """Mesh axes of the ranks that hold the same."""
        alone = self.plan.expert > 1 and of_experts(path)
        return (self.replicas,) if alone else (self.replicas, *self.group)

    def _used(self, params: Tree, shapes: Tree) -> Tree:
        """Parameters as the modules take them: gathered, if the replicas share them."""
        if self.plan.optimizer != "zero3":
            return params

        def one(path, like, x):
            return self._gathered(path, like, x) if self.spreads(path) else x

        return jax.tree_util.tree_map_with_path(one, shapes, params)

    def _gathered(self, path, like, x: Array) -> Array:
        return gathered(0, gather_group(x, self._axes(path)), like)

    def _summed(self, path, g: Array) -> Array:
        """The sum over the ranks that hold the same, of which a rank keeps its part."""
        axes = self._axes(path)
        if is_load(path):
            return lax.psum(g, axes)
        g = g.astype(self.dtype)
        if self.spreads(path):
            g = scatter_sum(spread(0, g, self.copies(path)), axes)
        else:
            g = lax.psum(g, axes)
        return g.astype(jnp.float32)
