"""A rank of a pipeline: where it stands, and what its modules make of a micro-batch.

    x = embed(params, tokens),   x = passes in turn,   loss, d x, ... = end(params, x, tokens)

A kind of model says what these are; `cmjax.parallelism.ticks` runs them by a timetable. All stages
run one program: each has both ends of the model and a place for every layer that any stage has
there, and `Pass.stages` says whose they are.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax.parallelism.backward import Backward
from cmjax.parallelism.known import choose, put, take
from cmjax.parallelism.plan import Plan
from cmjax.parallelism.shards import Parts, Tree
from cmjax.parallelism.timetable import Timetable, timetable
from cmjax.program.mark import permuted


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """A layer of a chunk, as some stages run it.

    Fields:
      part: its parameters' place among `Parts.layers`.
      stages: which of them run it so; others have another layer there, or recompute otherwise.
      backward: its two passes.
      in_output: whether the end of the model runs it in place of the last stage.
    """

    part: int
    stages: Sequence[bool]
    backward: Backward
    in_output: bool = False


class Staged(abc.ABC):
    """What a rank of a plan runs, where it stands, and what it exchanges with its like.

    Args:
      plan, global_batch: a plan that divides.
      dtype: of parameters and activations; gradients are summed in float32.
      stage_axis: mesh axis of the stages.
      fill: whether a stage that nothing is sent to receives zeros by being sent them, as axes of
        `jax.vmap` need it.
    """

    def __init__(self, plan: Plan, global_batch: int, dtype, stage_axis: str, *, fill: bool):
        self.plan, self.dtype = plan, dtype
        self.stage_axis, self.fill = stage_axis, fill
        self.micro_batches = plan.micro_batches(global_batch)
        self.table: Timetable = timetable(
            plan.schedule, self.micro_batches, plan.pipeline, plan.interleave
        )

    # --- what a kind of model computes ----------------------------------------------------------

    @property
    @abc.abstractmethod
    def stream(self) -> jax.ShapeDtypeStruct:
        """What stages pass on of a micro-batch."""

    @property
    @abc.abstractmethod
    def passes(self) -> Sequence[Pass]:
        """The layers of a chunk in order, each as often as stages differ in how they run it."""

    def own_tokens(self, tokens: Int[Array, "sequences length"]) -> Array:
        """Of a replica's sequences, what this rank reads and predicts."""
        return tokens

    @abc.abstractmethod
    def layer(self, params: Parts, part: int, chunk) -> Tree:
        """Parameters of a layer, as it is computed with."""

    @abc.abstractmethod
    def embed(self, params: Parts, tokens: Int[Array, "sequences length"]) -> Array:
        """The stream before the first layer."""

    @abc.abstractmethod
    def end(self, params: Parts, y: Array, tokens, scale: float, chunk) -> tuple[Array, Array, Any]:
        """(loss, gradient of `scale` times the loss by `y`, gradients as `add_end` takes them)."""

    @abc.abstractmethod
    def add_end(self, grads: Parts, sums: Any, chunk) -> Parts:
        """`grads` with those of the end of the model."""

    @abc.abstractmethod
    def embedding_sums(self, params: Parts, tokens, g: Array) -> Tree:
        """Gradients of the embedding, as they are added up."""

    @abc.abstractmethod
    def layer_sums(self, d: Tree) -> Tree:
        """A micro-batch's gradients of a layer, as they are added up."""

    @abc.abstractmethod
    def zeros(self, params: Parts) -> Parts:
        """Sums of gradients before the first micro-batch."""

    @abc.abstractmethod
    def reduced(self, grads: Parts) -> Parts:
        """The sums of all micro-batches, summed over the ranks that have addends of them."""

    # --- where this rank is ---------------------------------------------------------------------

    @property
    def stage(self) -> Array | int:
        return lax.axis_index(self.stage_axis) if self.plan.pipeline > 1 else 0

    def send(self, x: Array, pairs: list[tuple[int, int]]) -> Array:
        """`x` from one stage to another, by (source, destination)."""
        return permuted(x, self.stage_axis, pairs, fill=self.plan.pipeline if self.fill else None)

    def pass_on(self, x: Array, pairs: list[tuple[int, int]], here) -> Array:
        """A stream from neighbouring stages; `here` says whether one comes."""
        del here
        return self.send(x, pairs)

    def at_stages(self, stages: Sequence[bool], change: Callable, tree: Tree) -> Tree:
        """`change(tree)` on some stages; elsewhere nothing is sent, and what comes out is zero."""
        here = True if all(stages) else jnp.asarray(stages)[self.stage]
        return choose(here, lambda: change(tree))

    def at_stage(self, stage: int, change: Callable, tree: Tree) -> Tree:
        """Likewise, on one stage."""
        stages = range(self.plan.pipeline)
        return self.at_stages([s == stages[stage] for s in stages], change, tree)

    def words_of_both_ends(self, grads: Parts, name: str) -> Parts:
        """`grads` with those of the words `name`, of which the two ends have a copy each, added."""
        last, mine = self.plan.pipeline - 1, grads.embedding[name]
        at_end = jnp.where(self.stage == last, grads.output[name], mine)
        other = self.send(at_end.astype(self.dtype), [(0, last), (last, 0)])
        total = at_end + other.astype(jnp.float32)
        return dataclasses.replace(
            grads,
            embedding={**grads.embedding, name: total},
            output={**grads.output, name: total},
        )


def add_to_layer(grads: Parts, part: int, chunk, d: Tree) -> Parts:
    """`grads` with a micro-batch's gradients of a layer."""

    def add(total: Float[Array, "chunks *shape"], g: Array) -> Array:
        return put(total, chunk, take(total, chunk) + g)

    layers = list(grads.layers)
    layers[part] = jax.tree.map(add, layers[part], d)
    return dataclasses.replace(grads, layers=tuple(layers))
