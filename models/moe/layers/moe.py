"""The mixture-of-experts block of one layer on one rank: route, dispatch, experts, combine.

The four stages are methods, so that a schedule can interleave those of several microbatches. The
shared expert is computed by every rank for its own tokens, or, where the slot table has slots for
it, dispatched to like a routed expert with weight 1 (CloudMatrix384 paper, section 4.2).
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layers.experts import Experts, SwiGLU
from cmjax.models.moe.layers.few import is_few
from cmjax.models.moe.layers.linear import observed
from cmjax.models.moe.layers.norm import RMSNorm
from cmjax.models.moe.layers.route import is_one_call as is_routed_at_once
from cmjax.models.moe.layers.route import route
from cmjax.models.moe.layers.router import Router
from cmjax.models.moe.layers.sorted import SortedRows, sort_by_slot, unsort
from cmjax.models.moe.layers.sorted_experts import sorted_experts
from cmjax.models.moe.parallelism import Parallelism
from cmjax.primitives.exchange import Dispatched, combine, dispatch
from cmjax.primitives.msd import QuantizedWeight
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

    def send(self, routed: Routed) -> Dispatched | SortedRows:
        """Dispatch, in INT8 if the experts are."""
        if self.parallelism.sorts_rows:
            count = self.parallelism.table.slots_per_rank
            return sort_by_slot(routed.x, routed.slots, count, quantize=self.quantize)
        return dispatch(routed.x, routed.slots, quantize=self.quantize, **self._exchange)

    def compute(self, sent: Dispatched | SortedRows, dtype: jnp.dtype) -> Array:
        """Apply the experts in this rank's slots: `[slots, rows, hidden]`, or `[rows, hidden]` of
        sorted rows."""
        if isinstance(sent, SortedRows):
            return self.experts.of_sorted(sent, dtype)
        if not self.parallelism.permutes:
            return self.experts(sent.rows, sent.scale, dtype)
        how = {"ranks": self.parallelism.ranks, "copies": sent.position.shape[1]}
        return unpermute(self.experts(permute(sent.rows, **how), sent.scale, dtype), **how)

    def receive(
        self, rows: Array, sent: Dispatched | SortedRows, routed: Routed
    ) -> Float[Array, "tokens hidden"]:
        """Combine the routed experts' outputs."""
        if isinstance(sent, SortedRows):
            return unsort(rows, sent, routed.weights)
        return combine(rows, routed.slots, sent.position, routed.weights, **self._exchange)

    def compute_shared(self, routed: Routed) -> Float[Array, "tokens hidden"] | None:
        """The local shared expert on this rank's own tokens, if there is one."""
        return None if self.shared is None else self.shared(routed.x)

    def is_one_call(self, routed: Routed) -> bool:
        """Whether a CPU has `mix` for these tokens: few, and experts in formats that it reads."""
        mixed = is_few(routed.x) and self.parallelism.sorts_rows and not observed()
        matrices = self.experts.gate_up.matrix.value, self.experts.down.matrix.value
        return mixed and all(isinstance(w, QuantizedWeight) for w in matrices)

    def mix(self, routed: Routed) -> Float[Array, "tokens hidden"]:
        """`send`, `compute` and `receive` as one call."""
        up, down = self.experts.gate_up.matrix.value, self.experts.down.matrix.value
        assert isinstance(up, QuantizedWeight) and isinstance(down, QuantizedWeight), "is_one_call"
        return sorted_experts(routed.x, routed.slots, routed.weights, up, down)

    @property
    def _exchange(self) -> dict:
        parallelism = self.parallelism
        return {
            "axes": parallelism.axes,
            "ranks": parallelism.ranks,
            "slots_per_rank": parallelism.table.slots_per_rank,
            "capacity": parallelism.capacity,
        }


def run_moe(
    moe: MoE, xs: tuple[Float[Array, "tokens hidden"], ...], routed: tuple[Routed, ...]
) -> tuple[Float[Array, "tokens hidden"], ...]:
    """The residual stream after the block, for several routed microbatches: each stage is issued
    for all of them before the next. The shared expert runs while tokens travel."""
    stages = functools.partial(_by_stages, moe)
    if not all(moe.is_one_call(r) for r in routed):
        return stages(xs, routed)
    return lax.platform_dependent(xs, routed, cpu=functools.partial(_by_call, moe), default=stages)


def _by_call(moe: MoE, xs, routed):
    out = []
    for x, r in zip(xs, routed, strict=True):
        x, z = x + moe.mix(r), moe.compute_shared(r)
        out.append(x if z is None else x + z)
    return tuple(out)


def _by_stages(moe: MoE, xs, routed):
    block = moe.parallelism.schedule.block
    sent, shared, rows, out = [], [], [], []
    for r in routed:
        with block("dispatch"):
            sent.append(moe.send(r))
    for x, s in zip(xs, sent, strict=True):
        with block("experts"):
            rows.append(moe.compute(s, x.dtype))
    for r in routed:
        with block("experts", scope="shared"):
            shared.append(moe.compute_shared(r))
    for x, y, z, s, r in zip(xs, rows, shared, sent, routed, strict=True):
        with block("combine"):
            x = x + moe.receive(y, s, r)
            out.append(x if z is None else x + z)
    return tuple(out)


__all__ = ["MoE", "Routed", "SlotVariable", "run_moe"]
