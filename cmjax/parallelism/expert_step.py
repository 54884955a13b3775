"""A plan of a mixture of experts, executed: one training step on all of its ranks.

    step = expert_step("data=8,expert=4,pipeline=2,optimizer=zero1", training, global_batch=16)
    state = step.initial(seed=0)
    state, result = step(state, tokens)                    tokens [16, sequence + 1]

The layers are those that are priced (`cmjax.parallelism.expert_program`); all ranks of a stage have
sequences of their own. What a rank's loss says about experts comes to the ranks that have them by
the transposes of dispatch and combine.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from cmjax.inputs import check_count
from cmjax.mesh import RANKED
from cmjax.models.moe.arithmetic import FLOATS, Arithmetic
from cmjax.models.moe.balancing import balanced, is_load
from cmjax.models.moe.layers.transformer import Transformer
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.slots import ep_table
from cmjax.parallelism.executed import Executed, TrainState
from cmjax.parallelism.expert_pieces import MoETraining
from cmjax.parallelism.expert_rank import ExpertRank
from cmjax.parallelism.expert_shards import (
    cut,
    expert_axes,
    expert_mesh,
    group_axes,
    join,
    replica_of,
)
from cmjax.parallelism.plan import Plan, parse_plan
from cmjax.parallelism.shards import Parts, Tree
from cmjax.parallelism.ticks import gradients


def expert_step(
    plan: Plan | str,
    training: MoETraining,
    *,
    global_batch: int,
    optimizer: optax.GradientTransformation | None = None,
    bias_rate: float = 1e-3,
    clip: float | None = 1.0,
    dtype: Any = jnp.float32,
    capacity: int | None = None,
    virtual: bool | None = None,
) -> "ExpertStep":
    """A training step of a mixture of experts under a plan.

    Args:
      plan: `data`, `expert`, `context`, `pipeline`, `micro_batch`, `schedule`, `recompute`, and
        `optimizer`.
      training: the model, without the modules that predict further tokens, and its sequences.
      global_batch: sequences of a step.
      optimizer: works element by element (`optax.adamw(1e-4)` by default).
      bias_rate: step of the balancing biases (DeepSeek-V3's by default), where the model has them.
      clip: largest norm of the gradient; `None` for any.
      dtype: float32 or bfloat16: of parameters, activations, and gradients as they are exchanged.
      capacity: rows of a micro-batch that an expert takes from a rank; by default any number, and
        the gradient is one device's.
      virtual: several ranks on an XLA device; by default where there are fewer devices than ranks.
    Raises: ValueError: degrees that do not divide, or what is priced but not executed.

    >>> import dataclasses
    >>> import numpy as np
    >>> from cmjax.models.moe.presets import tiny
    >>> from cmjax.parallelism import MoETraining, expert_step
    >>> training = MoETraining(model=tiny(), sequence=8)
    >>> step = expert_step("data=2,expert=2", training, global_batch=2)
    >>> state, result = step(step.initial(seed=0), np.arange(18).reshape(2, 9))
    >>> bool(result.loss > 5)
    True
    """
    plan = parse_plan(plan) if isinstance(plan, str) else plan
    check_count("global_batch", global_batch)
    training.check(plan, global_batch)
    if jnp.dtype(dtype).name not in FLOATS:
        raise ValueError(f"dtype must be float32 or bfloat16, got {jnp.dtype(dtype).name}")
    mesh = expert_mesh(plan)
    if virtual is None:
        virtual = len(jax.devices()) < mesh.ranks
    return ExpertStep(
        plan=plan, training=training, global_batch=global_batch, mesh=mesh, virtual=virtual,
        dtype=jnp.dtype(dtype), clip=clip, capacity=capacity,
        optimizer=balanced(optax.adamw(1e-4) if optimizer is None else optimizer, bias_rate),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ExpertStep(Executed):
    """A compiled step of a mixture of experts; made by `expert_step`."""

    training: MoETraining
    capacity: int | None

    @property
    def sequence(self) -> int:
        return self.training.sequence

    def replica_of(self, rank: int) -> int:
        return replica_of(rank, self.plan)

    def random(self, seed: int) -> Tree:
        model = self.training.model
        made = Transformer(
            model, one_rank(model), arithmetic=self._arithmetic, rngs=nnx.Rngs(params=seed)
        )
        return nnx.to_pure_dict(nnx.split(made)[1])

    def state(self, whole: Tree) -> TrainState:
        program = self.program
        params = cut(whole, self.training, self.plan, self._parallelism, words=program.copies_words)
        own = self.lift(program.own, (RANKED,), RANKED)(params)
        optimizer = self.lift(self.optimizer.init, (RANKED,), RANKED)(own)
        if self.plan.optimizer == "zero3":
            params = own
        params = jax.tree_util.tree_map_with_path(self._as_held, params)
        return TrainState(params, None if self.dtype == jnp.float32 else own, optimizer)

    def whole(self, parts: Parts) -> Tree:
        """Parameters, or gradients, as one device has them; `None` for tables of slots."""
        return join(parts, self.training, self.plan, self.program.shapes)

    def rank_gradients(self, params: Parts, tokens):
        """(share of the loss, gradients, share of their square) on a rank."""
        loss, grads = gradients(self.program, params, tokens)
        return loss, grads, self.program.square(grads)

    def rank_update(self, state: TrainState, grads: Parts, scale) -> TrainState:
        """The optimizer's step on what a rank has of every parameter."""
        program, master = self.program, state.master
        if master is None:
            spread_already = self.plan.optimizer == "zero3"
            master = state.params if spread_already else program.own(state.params)
        grads = jax.tree_util.tree_map_with_path(
            lambda path, g: g if is_load(path) else g * scale, grads
        )
        update: Any = self.optimizer.update
        updates, optimizer = update(grads, state.optimizer, master)
        master: Any = optax.apply_updates(master, updates)
        params = jax.tree_util.tree_map_with_path(self._as_held, master)
        if self.plan.optimizer in ("zero1", "zero2"):
            params = program.gathered(params)
        return TrainState(params, None if state.master is None else master, optimizer)

    def _as_held(self, path, x: Array) -> Array:
        """In the precision of the parameters."""
        return x if is_load(path) else x.astype(self.dtype)

    @functools.cached_property
    def program(self) -> ExpertRank:
        return ExpertRank(
            self.plan, self.training, self.global_batch, self._arithmetic, self._parallelism,
            virtual=self.virtual,
        )  # fmt: skip

    @functools.cached_property
    def _arithmetic(self) -> Arithmetic:
        name: Any = self.dtype.name
        return Arithmetic.of(name)

    @functools.cached_property
    def _parallelism(self) -> Parallelism:
        share, context = self.plan.expert, self.plan.context
        return Parallelism(
            table=ep_table(self.training.model.routed_experts, share),
            axes=group_axes(self.plan) if share > 1 else (),
            capacity=self.capacity,
            context=context,
            context_axes=(expert_axes(self.plan)["context"],) if context > 1 else (),
        )
