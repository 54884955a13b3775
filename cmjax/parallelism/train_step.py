"""A plan, executed: one training step of a dense decoder on all of its ranks.

    step = train_step("data=2,tensor=2,pipeline=2,optimizer=zero1", "pangu-tiny", global_batch=8)
    state = step.initial(seed=0)
    state, result = step(state, tokens)                     tokens [8, sequence + 1]

The modules are those that are priced (`cmjax.parallelism.pieces`). Loss and gradients are those of
one device; a plan changes where they are computed, and in which order they are added up.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from cmjax.mesh import RANKED, RankMesh
from cmjax.models.dense import DenseConfig, DenseModel, preset
from cmjax.parallelism.executed import Executed, TrainState
from cmjax.parallelism.plan import Plan, parse_plan
from cmjax.parallelism.rank_program import RankProgram, words_apart
from cmjax.parallelism.shards import (
    Parts,
    Tree,
    cut,
    join,
    mesh_of,
    place_of,
    split_axis,
    spread,
)
from cmjax.parallelism.ticks import gradients


def train_step(
    plan: Plan | str,
    model: DenseConfig | str,
    mesh: RankMesh | None = None,
    *,
    global_batch: int,
    optimizer: optax.GradientTransformation | None = None,
    clip: float | None = 1.0,
    dtype: Any = jnp.float32,
    virtual: bool | None = None,
) -> "TrainStep":
    """A training step under a plan.

    Args:
      plan: how the step is split, as `cmjax.parallel` finds it or `parse_plan` reads it.
      model: sizes, or the name of a preset. It is trained without dropout.
      mesh: the ranks; by default as many as the plan has, its first dimension closest together.
      global_batch: sequences of a step.
      optimizer: works element by element (`optax.adamw(1e-4)` by default): a rank has a part of
        every parameter only.
      clip: largest norm of the gradient; `None` for any.
      dtype: of parameters and activations, and of gradients as they are exchanged.
      virtual: several ranks on an XLA device, as `on_every_rank` has them; by default where there
        are fewer devices than ranks.
    Raises: ValueError: degrees that do not divide, another number of ranks, a model with dropout.

    >>> import numpy as np
    >>> from cmjax.parallelism import train_step
    >>> step = train_step("data=2", "pangu-tiny", global_batch=4)
    >>> tokens = np.arange(4 * 65).reshape(4, 65) % 256
    >>> state, result = step(step.initial(seed=0), tokens)
    >>> f"{float(result.loss):.1f}"  # near log 256 = 5.545
    '5.5'
    """
    plan = parse_plan(plan) if isinstance(plan, str) else plan
    model = preset(model) if isinstance(model, str) else model
    if model.dropout:
        model = dataclasses.replace(model, dropout=0.0)
    if isinstance(global_batch, bool) or not isinstance(global_batch, int) or global_batch < 1:
        raise ValueError(f"global_batch must be a whole number >= 1, got {global_batch!r}")
    plan.check(model, global_batch)
    wanted = mesh_of(plan)
    if mesh is not None and mesh != wanted:
        raise ValueError(f"mesh: the plan's {'-'.join(plan.order)} takes {wanted}, got {mesh}")
    if virtual is None:
        virtual = len(jax.devices()) < wanted.ranks
    return TrainStep(
        plan=plan, model=model, global_batch=global_batch, mesh=wanted, virtual=virtual,
        dtype=jnp.dtype(dtype), clip=clip,
        optimizer=optax.adamw(1e-4) if optimizer is None else optimizer,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TrainStep(Executed):
    """A compiled step of a dense decoder; made by `train_step`."""

    model: DenseConfig

    @property
    def sequence(self) -> int:
        return self.model.sequence

    def replica_of(self, rank: int) -> int:
        return place_of(rank, self.plan)["data"] // self.plan.context

    def random(self, seed: int) -> Tree:
        return nnx.to_pure_dict(nnx.split(DenseModel(self.model, rngs=nnx.Rngs(seed)))[1])

    def whole(self, parts: Parts) -> Tree:
        """Parameters, or gradients, as one device has them."""
        return self._whole(parts)

    @functools.cached_property
    def _whole(self) -> Callable:
        shapes = self.program.graphs.shapes
        everywhere = NamedSharding(self.sharding.mesh, PartitionSpec())
        return jax.jit(
            lambda parts: join(parts, self.model, self.plan, shapes), out_shardings=everywhere
        )

    @functools.cached_property
    def program(self) -> RankProgram:
        return RankProgram(
            self.plan, self.model, self.global_batch, self.dtype, virtual=self.virtual
        )

    # --- of a rank ------------------------------------------------------------------------------

    def rank_gradients(self, params: Parts, tokens):
        """(share of the loss, gradients, share of their square) on a rank."""
        loss, grads = gradients(self.program, params, tokens)
        return loss, grads, self._square(grads)

    def rank_update(self, state: TrainState, grads: Parts, scale) -> TrainState:
        """The optimizer's step on what a rank has of every parameter."""
        program, spreads = self.program, self.plan.optimizer != "none"
        master = self._own(state.params) if state.master is None else state.master
        grads = grads.map(lambda _, g: g * scale)
        update: Any = self.optimizer.update
        updates, optimizer = update(grads, state.optimizer, master)
        master: Any = optax.apply_updates(master, updates)
        params = master.map(lambda _, x: x.astype(self.dtype))
        if spreads and self.plan.optimizer != "zero3":

            def everyone(lead, x, like):
                shape = jax.ShapeDtypeStruct(like.shape[lead:], like.dtype)
                return program.of_replicas(lead, x, shape)

            def at_ends(name, stage):
                mine, old = getattr(params, name), getattr(state.params, name)
                return program.at_stage(
                    stage, lambda _: jax.tree.map(functools.partial(everyone, 0), mine, old), mine
                )

            def of_layer(pair):
                return jax.tree.map(functools.partial(everyone, 1), *pair)

            pairs = list(zip(params.layers, state.params.layers, strict=True))
            params = Parts(
                layers=program.where_they_are(of_layer, pairs),
                embedding=at_ends("embedding", 0),
                output=at_ends("output", -1),
            )
        return TrainState(params, None if state.master is None else master, optimizer)

    def _own(self, params: Parts) -> Parts:
        """What the optimizer of a rank works on."""
        plan = self.plan
        if plan.optimizer in ("none", "zero3"):
            return params

        def part(lead, x):
            x = spread(lead, x, plan.data)
            size = x.shape[lead] // plan.data
            at = lax.axis_index(self.program.data_axis) * size if plan.data > 1 else 0
            return lax.dynamic_slice_in_dim(x, at, size, axis=lead)

        return params.map(part)

    def _square(self, grads: Parts) -> Float[Array, ""]:
        """The squares of this rank's gradients, each element counted once over all ranks."""
        plan, shapes = self.plan, self.program.graphs.shapes
        whole = DenseShapes(self.model)
        copies = plan.data if plan.optimizer == "none" else 1

        def total(tree, own, like):
            def one(g, own, like):
                held = copies * (plan.tensor if split_axis(like.shape, own.shape) is None else 1)
                return jnp.sum(g * g) / held

            return sum(jax.tree.leaves(jax.tree.map(one, tree, own, like)), start=jnp.zeros(()))

        squares = sum(
            total(*each) for each in zip(
                grads.layers, shapes.layers, (whole.layer,) * len(shapes.layers), strict=True
            )
        )  # fmt: skip
        output, own = dict(grads.output), dict(shapes.output)
        if words_apart(self.program) and self.model.tied:  # counted with the embedding
            del output["words"], own["words"]
        first, last = self.program.stage == 0, self.program.stage == plan.pipeline - 1
        ends = total(grads.embedding, shapes.embedding, whole.embedding) * jnp.asarray(first)
        like = {name: whole.output[name] for name in own}
        return squares + ends + total(output, own, like) * jnp.asarray(last)

    def state(self, whole: Tree) -> TrainState:
        plan = self.plan
        params = cut(whole, self.model, plan, self.program.graphs.shapes)
        fine = params.map(lambda _, x: x.astype(jnp.float32))
        own = self.lift(self._own, (RANKED,), RANKED)(fine)
        if plan.optimizer == "zero3":

            def mine(lead, x):
                x = spread(lead, x, plan.data)
                size = x.shape[lead] // plan.data
                at = lax.axis_index(self.program.data_axis) * size if plan.data > 1 else 0
                return lax.dynamic_slice_in_dim(x, at, size, axis=lead)

            own = self.lift(lambda params: params.map(mine), (RANKED,), RANKED)(fine)
            params = own
        optimizer = self.lift(self.optimizer.init, (RANKED,), RANKED)(own)
        params = params.map(lambda _, x: x.astype(self.dtype))
        return TrainState(params, own if self.dtype != jnp.float32 else None, optimizer)


class DenseShapes:
    """Shapes of one device's parameters, as `Parts` names them."""

    def __init__(self, model: DenseConfig):
        made = nnx.eval_shape(lambda: DenseModel(model, rngs=nnx.Rngs(0)))
        whole = nnx.to_pure_dict(nnx.split(made)[1])
        self.embedding = whole["embedding"]
        self.output = {name: tree for name, tree in whole["output"].items() if name != "query"}
        self.output["words"] = whole["words"] if not model.tied else whole["embedding"]["words"]
        if model.blocks:
            self.layer = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), whole["blocks"]
            )
        else:
            self.layer = whole["output"]["query"]
