"""A rank of a plan: its modules, its place, and what it sends to replicas and other stages.

Parameters that are spread over the replicas (zero3) are gathered as they are used; their gradients
(zero2 too) are summed and spread as they are made, and all others at the end of the step.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cmjax.models.dense import DenseConfig, Recompute
from cmjax.parallelism.known import choose
from cmjax.parallelism.layerwise import MODES
from cmjax.parallelism.memory import split_of
from cmjax.parallelism.plan import Plan
from cmjax.parallelism.shards import Graphs, Parts, Tree, axes_of, gathered, graphs, spread
from cmjax.parallelism.timetable import Timetable, timetable
from cmjax.program.mark import permuted

SUMMED = frozenset({"gain", "shift", "output_bias", "ffn_bias"})
"""Parameters that every tensor-parallel rank holds and that with sequence parallelism it applies to
its own part of the sequence: their gradients are addends."""


class RankProgram:
    """What a rank of a plan runs, where it stands, and what it exchanges with its like.

    Args:
      plan, model, global_batch: a plan that divides (`Plan.check`).
      dtype: of parameters and activations; gradients are summed in float32.
      virtual: whether axes of the mesh but the first are `jax.vmap`'s.
    """

    def __init__(
        self, plan: Plan, model: DenseConfig, global_batch: int, dtype, *, virtual: bool = False
    ):
        self.plan, self.model, self.dtype = plan, model, dtype
        axes = axes_of(plan)
        self.data_axis, self.stage_axis = axes["data"], axes["pipeline"]
        self.fill = virtual and self.stage_axis != "node"
        self.split = dataclasses.replace(split_of(plan), axis=axes["tensor"])
        self.graphs: Graphs = graphs(model, plan, dtype, self.split)
        self.micro_batches = plan.micro_batches(global_batch)
        self.table: Timetable = timetable(
            plan.schedule, self.micro_batches, plan.pipeline, plan.interleave
        )
        self.number = len(self.graphs.shapes.layers)

    def modes_of(self, layer: int) -> dict[Recompute, list[bool]]:
        """What is recomputed of a layer of a chunk, and on which stages."""
        stages = [
            self.plan.recomputed(stage, self.number).mode_of(layer)
            for stage in range(self.plan.pipeline)
        ]
        return {mode: [each == mode for each in stages] for mode in MODES if mode in stages}

    @property
    def mode_of_last(self) -> Recompute:
        """What is recomputed of the model's last layer."""
        last = self.plan.recomputed(self.plan.pipeline - 1, self.number)
        return last.mode_of(self.number - 1)

    def reduced(self, grads: Parts) -> Parts:
        """The sums of all micro-batches, summed over the ranks that have addends of them."""
        plan = self.plan
        if plan.optimizer in ("none", "zero1"):
            grads = Parts(
                layers=self.over_replicas(grads.layers, 1),
                embedding=self.at_stage(0, lambda x: self.over_replicas(x, 0), grads.embedding),
                output=self.at_stage(-1, lambda x: self.over_replicas(x, 0), grads.output),
            )
        if self.split.sequence:
            grads = Parts(
                layers=self._sum_copies(grads.layers),
                embedding=grads.embedding,
                output=self.at_stage(-1, self._sum_copies, grads.output),
            )
        if plan.pipeline > 1 and self.model.tied:
            p, mine = plan.pipeline, grads.embedding["words"]
            at_end = jnp.where(self.stage == p - 1, grads.output["words"], mine)
            other = self.send(at_end.astype(self.dtype), [(0, p - 1), (p - 1, 0)])
            total = at_end + other.astype(jnp.float32)
            grads = dataclasses.replace(
                grads,
                embedding={**grads.embedding, "words": total},
                output={**grads.output, "words": total},
            )
        return grads

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
        g = lax.psum_scatter(g, self.data_axis, scatter_dimension=lead, tiled=True)
        return g.astype(jnp.float32)

    def _sum_copies(self, grads: Tree) -> Tree:
        def one(path, g):
            if name_of(path) not in SUMMED:
                return g
            return lax.psum(g.astype(self.dtype), self.split.axis).astype(jnp.float32)

        return jax.tree_util.tree_map_with_path(one, grads)

    # --- where this rank is ---------------------------------------------------------------------

    @property
    def stage(self) -> Array | int:
        return lax.axis_index(self.stage_axis) if self.plan.pipeline > 1 else 0

    def send(self, x: Array, pairs: list[tuple[int, int]]) -> Array:
        """`x` from one stage to another, by (source, destination)."""
        return permuted(x, self.stage_axis, pairs, fill=self.plan.pipeline if self.fill else None)

    def at_stage(self, stage: int, change: Callable, tree: Tree) -> Tree:
        """`change(tree)` on one stage; elsewhere nothing is sent, and what comes out is zero."""
        wanted = stage % self.plan.pipeline
        here = True if self.plan.pipeline == 1 else self.stage == wanted
        return choose(here, lambda: change(tree))

    def whole(self, lead: int, params: Tree, shapes: Tree) -> Tree:
        """Parameters as the modules take them: gathered, if the replicas share them."""
        if self.plan.optimizer != "zero3":
            return params

        def one(x, like):
            if self.plan.data > 1:
                x = lax.all_gather(x, self.data_axis, axis=lead, tiled=True)
            return gathered(lead, x, like)

        return jax.tree.map(one, params, shapes)


def name_of(path) -> str:
    """The name of a leaf's parameter."""
    return str(next(k.key for k in reversed(path) if isinstance(getattr(k, "key", None), str)))


def words_apart(program: RankProgram) -> bool:
    """Whether the output's words are not the embedding's own array."""
    return "words" in program.graphs.shapes.output
