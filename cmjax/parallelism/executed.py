"""A training step on all ranks of a plan: what is the same whatever is trained.

    state, result = step(state, tokens)                     tokens [global batch, sequence + 1]

A kind of model says what a rank does (`rank_gradients`, `rank_update`); here that is lifted onto
the mesh, compiled, and its bytes are counted.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from cmjax.mesh import RANKED, REPLICATED, RankMesh, on_every_rank
from cmjax.parallelism.plan import Plan
from cmjax.verify import Traffic
from cmjax.verify.traffic import count_traffic, pair_bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run carries from step to step; every leaf has a leading axis of ranks.

    Fields:
      params: as the modules take them.
      master: float32 values that the optimizer works on, where the parameters are of less
        precision; `None` otherwise.
      optimizer: the optimizer's state, of this rank's part with a spread one.
    """

    params: Any
    master: Any | None
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepResult:
    """Mean loss over the global batch, in nats, and the norm of its gradient before clipping."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Executed(abc.ABC):
    """A compiled step: `step(state, tokens) -> (state, StepResult)`; the state is donated."""

    plan: Plan
    global_batch: int
    mesh: RankMesh
    virtual: bool
    dtype: Any
    optimizer: optax.GradientTransformation
    clip: float | None

    @property
    @abc.abstractmethod
    def sequence(self) -> int:
        """Tokens of a sequence that are read."""

    @abc.abstractmethod
    def replica_of(self, rank: int) -> int:
        """The replica that a rank is of, which has its own sequences."""

    @abc.abstractmethod
    def random(self, seed: int) -> Any:
        """Random parameters of one device, the same under every plan."""

    @abc.abstractmethod
    def state(self, whole: Any) -> TrainState:
        """The state of all ranks that begins with one device's parameters."""

    @abc.abstractmethod
    def rank_gradients(self, params, tokens) -> tuple[Array, Any, Array]:
        """(share of the loss, gradients, share of their square) on a rank."""

    @abc.abstractmethod
    def rank_update(self, state: TrainState, grads, scale) -> TrainState:
        """The optimizer's step on what a rank has of every parameter."""

    def __call__(self, state: TrainState, tokens) -> tuple[TrainState, StepResult]:
        """One step on [global batch, sequence + 1] tokens, or on what `place_tokens` gave."""
        return self.compiled(state, self.place_tokens(tokens))

    def initial(self, seed: int = 0) -> TrainState:
        """Random parameters, the same under every plan, and the optimizer's first state."""
        return jax.jit(lambda: self.state(self.random(seed)), out_shardings=self.sharding)()

    def place(self, whole: Any) -> TrainState:
        """The state that begins with one device's parameters (`nnx.to_pure_dict`)."""
        return jax.jit(self.state, out_shardings=self.sharding)(whole)

    def gradients(self, params, tokens) -> tuple[Float[Array, ""], Any]:
        """Mean loss and its gradients, float32, spread as the optimizer is."""
        loss, grads, _ = self._gradients(params, self.place_tokens(tokens))
        return loss, grads

    def place_tokens(self, tokens) -> Int[Array, "ranks sequences length"]:
        """Every rank's sequences: those of its replica. Given a function of a first and a last
        sequence of the global batch, only those of this process's ranks are asked for.

        Raises: ValueError: another number of sequences or of tokens.
        """
        length, share = self.sequence + 1, self.global_batch // self.plan.replicas
        if isinstance(tokens, jax.Array) and tokens.ndim == 3:
            return tokens
        if callable(tokens):
            rows = tokens
        else:
            shape = np.shape(tokens)
            if shape != (self.global_batch, length):
                raise ValueError(
                    f"tokens: expected [{self.global_batch}, {length}] (global batch, sequence + "
                    f"1), got {list(shape)}"
                )
            array = np.asarray(tokens, np.int32)
            rows = lambda first, last: array[first:last]  # noqa: E731

        def block(index):
            ranks = range(*index[0].indices(self.plan.devices))
            places = [self.replica_of(rank) for rank in ranks]
            read = {d: rows(d * share, (d + 1) * share) for d in sorted(set(places))}
            return np.stack([np.asarray(read[d], np.int32) for d in places])

        shape = self.plan.devices, share, length
        return jax.make_array_from_callback(shape, self.sharding, block)

    def traffic(self, state: TrainState, tokens) -> Traffic:
        """Bytes that a step moves between ranks, counted as it runs; with `virtual` ranks.

        Raises: ValueError: every rank has a device of its own.
        """
        if not self.virtual:
            raise ValueError("traffic is counted on virtual ranks; make the step with virtual=True")

        def whole(state, tokens):
            _, grads, _ = self.rank_gradients(state.params, tokens)
            return self.rank_update(state, grads, 1.0)

        lifted = self.lift(count_traffic(whole, self.mesh), (RANKED, RANKED), RANKED)
        _, received = jax.block_until_ready(jax.jit(lifted)(state, self.place_tokens(tokens)))
        return Traffic(self.mesh, {n: pair_bytes(found.moved) for n, found in received.items()})

    @functools.cached_property
    def compiled(self) -> Callable:
        """`step(state, placed tokens)`, jitted; `.lower` gives what XLA makes of it."""

        def step(state: TrainState, tokens):
            loss, grads, squares = self._gradients(state.params, tokens)
            norm = jnp.sqrt(squares)
            scale = 1.0 if self.clip is None else jnp.minimum(1.0, self.clip / (norm + 1e-12))
            return self._update(state, grads, jnp.asarray(scale)), StepResult(loss, norm)

        return jax.jit(step, donate_argnums=0)

    @functools.cached_property
    def sharding(self) -> NamedSharding:
        """Of everything with a leading axis of ranks."""
        mesh: Mesh = self.mesh.concrete() if self.virtual else self.mesh.plain()
        return NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def lift(self, fn: Callable, in_specs, out_specs) -> Callable:
        """A program of one rank, on all of them."""
        return on_every_rank(
            fn, self.mesh, in_specs, out_specs, virtual=self.virtual, checked=False
        )

    def _gradients(self, params, tokens):
        lifted = self.lift(self.rank_gradients, (RANKED, RANKED), (RANKED, RANKED, RANKED))
        losses, grads, squares = lifted(params, tokens)
        return jnp.sum(losses) / (self.plan.data * self.plan.tensor), grads, jnp.sum(squares)

    def _update(self, state: TrainState, grads, scale) -> TrainState:
        return self.lift(self.rank_update, (RANKED, RANKED, REPLICATED), RANKED)(
            state, grads, scale
        )
