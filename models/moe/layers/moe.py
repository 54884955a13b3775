"""The mixture-of-experts block of one layer on one rank: route, dispatch, experts, combine.

The four stages are methods, so that a schedule can interleave those of several microbatches; for
inference on a device that has all ranks, rows are sorted by slot instead. The shared expert is
computed by every rank for its own tokens, or, where the slot table has slots for it, dispatched to
like a routed expert with weight 1 (CloudMatrix384 paper, section 4.2).
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layers.experts import Experts, SwiGLU
from cmjax.models.moe.layers.linear import observed
from cmjax.models.moe.layers.norm import RMSNorm
from cmjax.models.moe.layers.route import is_one_call as is_routed_at_once
from cmjax.models.moe.layers.route import route
from cmjax.models.moe.layers.router import Router
from cmjax.models.moe.layers.sorted import sort_by_slot, unsort
from cmjax.models.moe.layers.sorted_experts import is_one_call as is_mixed_at_once
from cmjax.models.moe.layers.sorted_experts import sorted_experts
from cmjax.models.moe.parallelism import Parallelism
from cmjax.primitives.exchange import Dispatched, combine, dispatch
from cmjax.primitives.one_device import on_one_device
from cmjax.primitives.permute import permute, unpermute


class SlotVariable(nnx.Variable):
    """Which slots hold an expert; integers, per layer, not trained."""


class Routed(NamedTuple):
    """Normalised tokens and where they go."""

    x: Float[Array, "tokens hidden"]
    slots: Int32[Array, "tokens copies"]
    weights: Float32[Array, "tokens copies"]


class MoE(nnx.Module):
    """Experts of one layer, the input norm included; the residual is the caller's."""

    def __init__(
        self, config: MoEConfig, parallelism: Parallelism, *, arithmetic: Arithmetic, rngs: nnx.Rngs
    ):
        table = parallelism.table
        if table.routed_experts != config.routed_experts:
            raise ValueError(
                f"MoE: the slot table is for {table.routed_experts} routed experts, the model has "
                f"{config.routed_experts}"
            )
        if table.has_shared and config.ffn_bias:
            raise ValueError("MoE: a shared expert with biases cannot live in slots")
        if table.has_shared and config.shared_experts != 1:
            raise ValueError(
                "MoE: shared replicas in slots need shared_experts = 1 (one of a routed expert's "
                f"size), the model has {config.shared_experts}; use shared_replicas=0"
            )
        self.parallelism, self.quantize = parallelism, arithmetic.dispatches_int8
        hidden, ffn = config.hidden_size, config.expert_ffn_size
        self.norm = RMSNorm(hidden, config.norm_eps, rngs=rngs)
        self.router = Router(config, rngs=rngs)
        slots, copies = table.arrays()
        self.slots_of_expert = SlotVariable(jnp.asarray(slots))
        self.copies = SlotVariable(jnp.asarray(copies))
        self.experts = Experts(
            table.slots_per_rank, hidden, ffn, format=arithmetic.experts, rngs=rngs
        )
        local = config.shared_experts and not table.has_shared
        self.shared = (
            SwiGLU(
                hidden,
                ffn * config.shared_experts,
                parallelism,
                format=arithmetic.dense,
                rngs=rngs,
                bias=config.ffn_bias,
            )
            if local
            else None
        )

    def route(self, x: Float[Array, "tokens hidden"]) -> Routed:
        """Normalise, choose experts and a replica of each, the shared one's included."""
        rank = jnp.asarray(self.parallelism.rank, jnp.int32)

        def stages(x, rank):
            x = self.norm(x)
            return Routed(x, *self.router(x, rank, self.slots_of_expert[...], self.copies[...]))

        def call(x, rank):
            bias = None if self.router.bias is None else self.router.bias[...]
            gate = self.router.weight[...], bias, rank, self.slots_of_expert[...], self.copies[...]
            return Routed(*route(self.router.config, x, self.norm.gain[...], *gate))

        if not is_routed_at_once(x, self.router.weight[...]):
            return stages(x, rank)
        return lax.platform_dependent(x, rank, cpu=call, default=stages)

    def send(self, routed: Routed) -> Dispatched:
        """Dispatch, in INT8 if the experts are."""
        return dispatch(routed.x, routed.slots, quantize=self.quantize, **self._exchange)

    def compute(
        self, experts: Experts, sent: Dispatched, dtype: jnp.dtype
    ) -> Float[Array, "slots rows hidden"]:
        """Apply those in this rank's slots."""
        if not self.parallelism.permutes or self.parallelism.ranks == 1:
            return experts(sent.rows, sent.scale, dtype)
        how = {"ranks": self.parallelism.ranks, "copies": sent.position.shape[1]}
        return unpermute(experts(permute(sent.rows, **how), sent.scale, dtype), **how)

    def receive(
        self, rows: Float[Array, "slots rows hidden"], sent: Dispatched, routed: Routed
    ) -> Float[Array, "tokens hidden"]:
        """Combine the routed experts' outputs."""
        return combine(rows, routed.slots, sent.position, routed.weights, **self._exchange)

    def through_experts(self, routed: Routed) -> Float[Array, "tokens hidden"]:
        """The three in one: as they are, or of the rows of all ranks that are on one device."""
        graph, state = nnx.split(self.experts)
        block = self.parallelism.schedule.block

        def blocks(state: Any, routed: Routed) -> Array:
            with block("dispatch"):
                sent = self.send(routed)
            with block("experts"):
                rows = self.compute(nnx.merge(graph, state), sent, routed.x.dtype)
            with block("combine"):
                return self.receive(rows, sent, routed)

        def rows(state: Any, routed: Routed) -> Array:
            ranks, tokens = routed.x.shape[:2]
            state, together = jax.tree.map(_without_ranks, (state, routed))
            return self._sorted(nnx.merge(graph, state), together).reshape(ranks, tokens, -1)

        return on_one_device(blocks, rows, state, routed, axes=self.parallelism.axes)

    def compute_shared(self, routed: Routed) -> Float[Array, "tokens hidden"] | None:
        """The local shared expert on this rank's own tokens, if there is one."""
        return None if self.shared is None else self.shared(routed.x)

    def _sorted(self, experts: Experts, routed: Routed) -> Float[Array, "tokens hidden"]:
        """Of all slots, for tokens that are on this device; of few tokens one call on a CPU."""
        block = self.parallelism.schedule.block
        matrices = experts.gate_up.matrix, experts.down.matrix

        def stages(x, slots, weights):
            with block("dispatch"):
                count = self.parallelism.table.slots
                sent = sort_by_slot(x, slots, count, quantize=self.quantize)
            with block("experts"):
                y = experts.of_sorted(sent, x.dtype)
            with block("combine"):
                return unsort(y, sent, weights)

        if observed() or not is_mixed_at_once(*matrices, routed.x):
            return stages(*routed)

        def call(x, slots, weights):
            return sorted_experts(x, slots, weights, *matrices)

        return lax.platform_dependent(*routed, cpu=call, default=stages)

    @property
    def _exchange(self) -> dict:
        parallelism = self.parallelism
        return {
            "axes": parallelism.axes,
            "ranks": parallelism.ranks,
            "slots_per_rank": parallelism.table.slots_per_rank,
            "capacity": parallelism.capacity,
        }


def moe_stages(
    moe: MoE, x: Float[Array, "tokens hidden"], routed: Routed
) -> Generator[None, None, Float[Array, "tokens hidden"]]:
    """The residual stream of a microbatch after the block, in four stages of which a schedule may
    issue those of another microbatch in between. The shared expert runs while tokens travel. Where
    rows may be sorted all is one stage."""
    schedule = moe.parallelism.schedule
    block, before = schedule.block, schedule.shared_before_experts
    shared = None
    if moe.parallelism.sorts_rows:
        with block("experts", scope="shared"):
            shared = moe.compute_shared(routed)
        x = x + moe.through_experts(routed)
        return x if shared is None else x + shared
    with block("dispatch"):
        sent = moe.send(routed)
    if before:
        with block("experts", scope="shared"):
            shared = moe.compute_shared(routed)
    yield
    with block("experts"):
        rows = moe.compute(moe.experts, sent, x.dtype)
    yield
    if not before:
        with block("experts", scope="shared"):
            shared = moe.compute_shared(routed)
    yield
    with block("combine"):
        x = x + moe.receive(rows, sent, routed)
        return x if shared is None else x + shared


def run_moe(
    moe: MoE, x: Float[Array, "tokens hidden"], routed: Routed
) -> Float[Array, "tokens hidden"]:
    """All stages of `moe_stages`, one after another."""
    (y,) = moe.parallelism.schedule.issue([moe_stages(moe, x, routed)])
    return y


def _without_ranks(x: Array) -> Array:
    """`[ranks, n, ...]` to `[ranks * n, ...]`."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


__all__ = ["MoE", "Routed", "SlotVariable", "moe_stages", "run_moe"]
