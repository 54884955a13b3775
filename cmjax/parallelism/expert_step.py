"""A plan of a mixture of experts, executed: one training step on all of its ranks.

    step = expert_step("data=8,expert=4,optimizer=zero1", training, global_batch=16)
    state = step.initial(seed=0)
    state, result = step(state, tokens)                    tokens [16, sequence + 1]

    rank (r, e):  replica r of the experts' group, of which rank e has a part of every layer's
                  experts; e counts first. All ranks have sequences of their own.

The layers are those that are priced (`cmjax.parallelism.expert_program`). What a rank's loss says
about experts comes to the ranks that have them by the transposes of dispatch and combine.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array

from cmjax.inputs import check_count
from cmjax.mesh import RANKED, RankMesh
from cmjax.models.moe.arithmetic import FLOATS, Arithmetic
from cmjax.models.moe.balancing import balanced, is_load
from cmjax.models.moe.layers.transformer import Transformer
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.sharding import shard_params
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.trained import trained, with_tables
from cmjax.parallelism.backward import Backward, without_unread
from cmjax.parallelism.executed import Executed, TrainState
from cmjax.parallelism.expert_pieces import MoETraining
from cmjax.parallelism.expert_program import EndsProgram, LayerProgram, Tree, of_experts
from cmjax.parallelism.plan import Plan, parse_plan
from cmjax.parallelism.shards import gathered, spread
from cmjax.primitives.tensor import gather_group, scatter_sum


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
      plan: `data`, `expert`, `micro_batch`, `recompute`, and `optimizer`.
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
    if plan.pipeline > 1:
        raise ValueError(
            f"plan: a mixture of experts is executed with pipeline=1, got pipeline={plan.pipeline}"
        )
    if jnp.dtype(dtype).name not in FLOATS:
        raise ValueError(f"dtype must be float32 or bfloat16, got {jnp.dtype(dtype).name}")
    mesh = RankMesh(nodes=1, npus=plan.data // plan.expert, dies=plan.expert)
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
        return rank

    def random(self, seed: int) -> Tree:
        model = self.training.model
        made = Transformer(
            model, one_rank(model), arithmetic=self._arithmetic, rngs=nnx.Rngs(params=seed)
        )
        return nnx.to_pure_dict(nnx.split(made)[1])

    def state(self, whole: Tree) -> TrainState:
        params = self._copied(whole)
        own = self.lift(self._own, (RANKED,), RANKED)(params)
        optimizer = self.lift(self.optimizer.init, (RANKED,), RANKED)(own)
        if self.plan.optimizer == "zero3":
            params = with_tables(own, params)
        params = jax.tree_util.tree_map_with_path(self._as_held, params)
        return TrainState(params, None if self.dtype == jnp.float32 else own, optimizer)

    def whole(self, parts: Tree) -> Tree:
        """Parameters, or gradients, as one device has them; `None` for tables of slots."""
        groups, share = self.plan.data // self.plan.expert, self.plan.expert

        def one(path, own, x):
            lead = self._lead(path)
            x = x.reshape(groups, share, *x.shape[1:])
            if x.shape[2:] != own.shape:  # every replica has a part
                x = x.swapaxes(0, 1) if of_experts(path) else x.reshape(1, -1, *x.shape[2:])
                x = jnp.moveaxis(x, 1, 1 + lead)  # [share, (layers,) ranks that hold it, part]
                x = x.reshape(*x.shape[: 1 + lead], -1)
                x = gathered(1 + lead, x, jax.ShapeDtypeStruct(own.shape[lead:], own.dtype))
            else:
                x = x[0]
            if not of_experts(path):
                return x[0]
            x = jnp.swapaxes(x, 0, 1)  # [share, layers, slots, ...] -> [layers, experts, ...]
            return x.reshape(len(x), -1, *x.shape[3:])

        return jax.tree_util.tree_map_with_path(one, self._shapes, trained(parts))

    def _copied(self, whole: Tree) -> Tree:
        """What every rank has of one device's parameters, before they are spread."""
        ranks, groups = self.mesh.ranks, self.plan.data // self.plan.expert

        def everywhere(path, x):
            if not of_experts(path):
                return jnp.broadcast_to(x, (ranks, *x.shape))
            return jnp.broadcast_to(x, (groups, *x.shape)).reshape(ranks, *x.shape[1:])

        return jax.tree_util.tree_map_with_path(everywhere, shard_params(whole, self._parallelism))

    def rank_gradients(self, params, tokens):
        """(share of the loss, gradients, share of their square) on a rank."""
        plan = self.plan
        count = plan.micro_batches(self.global_batch)
        own = self._own(params) if plan.optimizer == "zero2" else trained(params)
        sums = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), own)
        sums, losses = lax.scan(
            lambda sums, tokens: self._accumulated(params, sums, tokens),
            sums, tokens.reshape(count, plan.micro_batch, -1),
        )  # fmt: skip

        def mean(path, g):
            return g if is_load(path) else g / (count * plan.data)

        def at_the_end(path, g):
            return g if self._early(path) else self._reduced(path, g)

        grads = jax.tree_util.tree_map_with_path(
            at_the_end, jax.tree_util.tree_map_with_path(mean, sums)
        )
        return jnp.mean(losses), grads, self._square(grads)

    def rank_update(self, state: TrainState, grads, scale) -> TrainState:
        master = state.master
        if master is None:
            spread_already = self.plan.optimizer == "zero3"
            master = trained(state.params) if spread_already else self._own(state.params)
        grads = jax.tree_util.tree_map_with_path(
            lambda path, g: g if is_load(path) else g * scale, grads
        )
        update: Any = self.optimizer.update
        updates, optimizer = update(grads, state.optimizer, master)
        master: Any = optax.apply_updates(master, updates)

        def everyone(path, like, x):
            x = self._as_held(path, x)
            return self._gathered(path, like, x) if self._spreads(path) else x

        if self.plan.optimizer == "zero3":
            params = jax.tree_util.tree_map_with_path(self._as_held, master)
        else:
            params = jax.tree_util.tree_map_with_path(everyone, trained(state.params), master)
        params = with_tables(params, state.params)
        return TrainState(params, None if state.master is None else master, optimizer)

    def _accumulated(self, params, sums, tokens) -> tuple[Tree, Array]:
        """(sums with the gradients of a micro-batch, its loss). A layer's gradients are added up as
        soon as its backward pass has made them."""
        ends, runs, saved = {name: params[name] for name in self._ends.shapes}, [], []
        ends = self._used(ends, self._ends.shapes)
        x, embedded = jax.vjp(lambda ends: self._ends.embed(ends, tokens[:, :-1]), ends)
        for kind, layers in self.training.model.runs:
            stack = jax.tree.map(lambda p, s=layers: p[s.start : s.stop], params[kind]["layers"])
            passes = self._backward[kind]
            forward = functools.partial(without_unread, passes.forward)
            used = functools.partial(self._used, shapes=self._layers[kind].shapes)
            x, kept = lax.scan(lambda x, params, f=forward, u=used: f(u(params), x), x, stack)
            runs.append((kind, jnp.arange(layers.start, layers.stop), stack))
            saved.append(kept)
        loss, back = jax.vjp(lambda ends, x: self._ends.loss(ends, x, tokens[:, 1:]), ends, x)
        at_end, g = back(jnp.ones_like(loss))
        sums = dict(sums)
        for (kind, numbers, stack), kept in zip(reversed(runs), reversed(saved), strict=True):

            def backward(carry, layer, kind=kind):
                g, sums = carry
                number, params, kept = layer
                params = self._used(params, self._layers[kind].shapes)
                d, g = self._backward[kind].both(params, kept, g)
                add, d = functools.partial(_added, number), self._kept(trained(d))
                return (g, jax.tree.map(add, sums, d)), None

            carry = g, sums[kind]["layers"]
            (g, total), _ = lax.scan(backward, carry, (numbers, stack, kept), reverse=True)
            sums[kind] = {"layers": total}
        (at_start,) = embedded(g)
        of_ends = self._kept(
            jax.tree.map(
                lambda a, b: a.astype(jnp.float32) + b.astype(jnp.float32), at_end, at_start
            )
        )
        for name in ends:
            sums[name] = jax.tree.map(jnp.add, sums[name], of_ends[name])
        return sums, loss

    def _used(self, params: Tree, shapes: Tree) -> Tree:
        """A layer's parameters, or the ends', as they are computed with: gathered, if the replicas
        share them."""
        if self.plan.optimizer != "zero3":
            return params

        def one(path, like, x):
            return self._gathered(path, like, x) if self._trains(path, like) else x

        return jax.tree_util.tree_map_with_path(one, shapes, params)

    def _kept(self, d: Tree) -> Tree:
        """A micro-batch's gradients of a layer, or of the ends, as they are added up."""

        def one(path, g):
            return self._reduced(path, g) if self._early(path) else g

        return jax.tree_util.tree_map_with_path(one, d)

    def _reduced(self, path, g: Array) -> Array:
        """The sum over the ranks that hold the same, of which a rank keeps its part."""
        axes = self._replicas(path)
        if is_load(path):
            return lax.psum(g, axes)
        g = g.astype(self.dtype)
        if self._spreads(path):
            g = scatter_sum(spread(0, g, self._copies(path)), axes)
        else:
            g = lax.psum(g, axes)
        return g.astype(jnp.float32)

    def _gathered(self, path, like, x: Array) -> Array:
        """What the ranks that hold the same have parts of; layers of a stack alike."""
        if not self._lead(path):
            return gathered(0, gather_group(x, self._replicas(path)), like)
        parts = gather_group(x.swapaxes(0, 1), self._replicas(path)).swapaxes(0, 1)
        return gathered(1, parts, jax.ShapeDtypeStruct(like.shape[1:], like.dtype))

    def _own(self, params: Tree) -> Tree:
        """What the optimizer of a rank works on, in float32."""

        def part(path, x):
            x = x.astype(jnp.float32)
            if not self._spreads(path):
                return x
            lead = self._lead(path)
            x = spread(lead, x, self._copies(path))
            size = x.shape[lead] // self._copies(path)
            at = lax.axis_index(self._replicas(path)) * size
            return lax.dynamic_slice_in_dim(x, at, size, axis=lead)

        return jax.tree_util.tree_map_with_path(part, trained(params))

    def _square(self, grads: Tree) -> Array:
        """The squares of this rank's gradients, each element counted once over all ranks."""
        total = jnp.zeros(())
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            held = 1 if self._spreads(path) else self._copies(path)
            total += 0.0 if is_load(path) else jnp.sum(g * g) / held
        return total

    def _as_held(self, path, x: Array) -> Array:
        """In the precision of the parameters."""
        floats = jnp.issubdtype(x.dtype, jnp.floating) and not is_load(path)
        return x.astype(self.dtype) if floats else x

    def _spreads(self, path) -> bool:
        return self.plan.optimizer != "none" and not is_load(path)

    def _early(self, path) -> bool:
        """Whether gradients are reduced as they are made, and nobody holds all of them."""
        return self.plan.optimizer in ("zero2", "zero3") and not is_load(path)

    def _trains(self, path, like) -> bool:
        """Whether a parameter is spread, and no table of slots."""
        return self._spreads(path) and jnp.issubdtype(like.dtype, jnp.floating)

    def _lead(self, path) -> int:
        """Leading axes of a leaf that are not spread: of layers, that are reduced one by one."""
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return int(stacked and self._early(path))

    def _replicas(self, path) -> tuple[str, ...]:
        """Axes of the ranks that hold the same."""
        return ("npu",) if of_experts(path) or self.plan.expert == 1 else ("npu", "die")

    def _copies(self, path) -> int:
        return self.plan.data // (self.plan.expert if of_experts(path) else 1)

    @functools.cached_property
    def _arithmetic(self) -> Arithmetic:
        name: Any = self.dtype.name
        return Arithmetic.of(name)

    @functools.cached_property
    def _parallelism(self) -> Parallelism:
        share = self.plan.expert
        return Parallelism(
            table=ep_table(self.training.model.routed_experts, share),
            axes=("die",) if share > 1 else (),
            capacity=self.capacity,
        )

    @functools.cached_property
    def _layers(self) -> dict[str, LayerProgram]:
        model, plan = self.training.model, self.plan
        return {
            kind: LayerProgram(
                model, self._parallelism, kind, plan.recompute_of_all, self._arithmetic
            )
            for kind in self.training.layers
        }

    @functools.cached_property
    def _backward(self) -> dict[str, Backward]:
        """The passes of a layer of every kind that there is."""
        model = self.training.model
        shape = self.plan.micro_batch, self.sequence, model.hidden_size
        x = jax.ShapeDtypeStruct(shape, self.dtype)

        def held(path, like):
            return jax.eval_shape(functools.partial(self._as_held, path), like)

        return {
            kind: Backward(layer, jax.tree_util.tree_map_with_path(held, layer.shapes), x)
            for kind, layer in self._layers.items()
        }

    @functools.cached_property
    def _ends(self) -> EndsProgram:
        return EndsProgram(self.training.model, self._arithmetic)

    @functools.cached_property
    def _shapes(self) -> Tree:
        """Of a rank's floating-point parameters, before they are spread."""
        held = jax.eval_shape(lambda: self._copied(self.random(0)))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), trained(held))


def _added(number, total: Array, d: Array) -> Array:
    """`total` with `d` added to its entry `number`."""
    entry = lax.dynamic_index_in_dim(total, number, keepdims=False) + d.astype(jnp.float32)
    return lax.dynamic_update_index_in_dim(total, entry, number, 0)
