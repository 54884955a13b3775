"""A fluid model of a service: requests as a flow through prefill, hand-over and decode.

    prefill   NPUs_p / npus_p x T / step_p(T, L) / uncached tokens per request
    RDMA      NPUs_p x dies x bandwidth / bytes of a prompt
    decode    NPUs_d x ranks x b / (step_d(b, C) x steps per request)

The least of them is the rate that the service can serve. Step times are those that the simulator
looks up, interpolated in JAX, so that the rate has a gradient in the split of the NPUs and in the
requests b per rank: Adam ascends it, with TPOT and memory as smooth limits. What is lost to waiting
is not in it; the simulator adds that.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from cmjax.serving.engine.table import Table

_STEPS, _RATE = 1500, 0.05
_SHARP = 0.02  # of the least rate: how far from it another one still counts


class Limits(NamedTuple):
    """Requests per second that each part could serve."""

    prefill: Array
    rdma: Array
    decode: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """What a request asks of the service, on average.

    Fields:
      uncached_tokens: of its prompt, to be computed. length: of prompts, by tokens (see
        `engine.table`). prompt_tokens: to hand over. steps: of decode. context: in the middle of
        it.
    """

    uncached_tokens: float
    length: float
    prompt_tokens: float
    steps: float
    context: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fluid:
    """Two kinds of instances on a machine, and what is asked of them.

    Fields:
      prefill, decode: step times. prefill_npus, decode_npus: of an instance.
      dies_per_npu: of the machine, each with a link. ranks_per_npu: those of decode that hold
        requests of their own. prefill_tokens: of a full step of an instance.
      kv_tokens: of a decode instance. tokens_per_step: of a decoding request.
      handover_token_s: seconds on one die's link for a token.
      slo_tpot_s: infinite without one.
    """

    prefill: Table
    decode: Table
    prefill_npus: int
    decode_npus: int
    dies_per_npu: int
    ranks_per_npu: float
    prefill_tokens: float
    kv_tokens: float
    tokens_per_step: float
    handover_token_s: float
    slo_tpot_s: float
    demand: Demand

    def limits(self, prefill_npus, decode_npus, per_rank) -> Limits:
        """What each part could serve with so many NPUs in all, and requests per rank.

        Differentiable in all three.
        """
        ask = self.demand
        step_p = _bilinear(
            self.prefill.tokens, self.prefill.length, self.prefill.batch_s[:, :, 0, 0],
            self.prefill_tokens, ask.length,
        )  # fmt: skip
        prefill = prefill_npus / self.prefill_npus * self.prefill_tokens / step_p
        links = prefill_npus * self.dies_per_npu
        ranks = decode_npus * self.ranks_per_npu
        return Limits(
            prefill=prefill / ask.uncached_tokens,
            rdma=links / (self.handover_token_s * ask.prompt_tokens),
            decode=ranks * per_rank / (self.decode_step_s(per_rank) * ask.steps),
        )

    def decode_step_s(self, per_rank) -> Array:
        """Seconds of a decode step with so many requests on every rank."""
        return _bilinear(
            self.decode.requests, self.decode.context, self.decode.batch_s[0, 0],
            per_rank, self.demand.context,
        )  # fmt: skip

    def most_per_rank(self) -> float:
        """Requests per rank that memory allows, at the mean context."""
        ranks = self.decode_npus * self.ranks_per_npu
        held = self.kv_tokens / ranks / self.demand.context if self.kv_tokens else np.inf
        return float(min(held, self.decode.requests[-1]))

    def served(self, prefill_npus, decode_npus, per_rank) -> Array:
        """The least of the limits, smoothed; less where TPOT or memory is over its limit."""
        limits = jnp.stack(self.limits(prefill_npus, decode_npus, per_rank))
        least = jnp.min(limits)
        sharp = jax.lax.stop_gradient(least) * _SHARP
        rate = -sharp * jax.nn.logsumexp(-limits / sharp)
        tpot_s = self.decode_step_s(per_rank) / self.tokens_per_step
        over = jax.nn.relu(tpot_s / self.slo_tpot_s - 1)
        full = jax.nn.relu(per_rank / self.most_per_rank() - 1)
        return rate * jnp.exp(-20.0 * (over + full))


class Proposal(NamedTuple):
    """A point of the fluid model.

    Fields:
      prefill_npus, decode_npus: in all. per_rank: requests. rate: requests per second.
      per_prefill_npu, per_decode_npu: requests per second that one more of each is worth.
      limits: of each part.
    """

    prefill_npus: float
    decode_npus: float
    per_rank: float
    rate: float
    per_prefill_npu: float
    per_decode_npu: float
    limits: Limits


def propose(fluid: Fluid, npus: int) -> Proposal:
    """Ascend the rate by gradient over the split of `npus` and the requests per rank."""
    most = fluid.most_per_rank()

    def unpack(x):
        prefill = npus * jax.nn.sigmoid(x[0])
        return prefill, npus - prefill, jnp.minimum(jnp.exp(x[1]), most)

    def loss(x):
        return -jnp.log(fluid.served(*unpack(x)))

    x = _ascend(loss, jnp.array([0.0, np.log(max(most / 2, 1.0))], jnp.float32))
    return at(fluid, *unpack(x))


def at(fluid: Fluid, prefill, decode, per_rank) -> Proposal:
    """The rate with so many NPUs in all and requests per rank, its slopes and what limits it."""
    slopes = jax.grad(fluid.served, argnums=(0, 1))(float(prefill), float(decode), per_rank)
    return Proposal(
        *(float(v) for v in (prefill, decode, per_rank, fluid.served(prefill, decode, per_rank))),
        *(float(s) for s in slopes),
        Limits(*(float(v) for v in fluid.limits(prefill, decode, per_rank))),  # type: ignore[arg-type]
    )


def _ascend(loss, x: Float[Array, "2"]) -> Float[Array, "2"]:
    """The best point that Adam comes by."""
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS, alpha=0.01))

    def step(carry, _):
        x, state, best, best_x = carry
        value, slope = jax.value_and_grad(loss)(x)
        best_x = jnp.where(value < best, x, best_x)
        update, state = optimizer.update(slope, state)
        return (x + update, state, jnp.minimum(value, best), best_x), None

    @functools.partial(jax.jit)
    def run(x):
        first = (x, optimizer.init(x), jnp.array(jnp.inf, x.dtype), x)
        return jax.lax.scan(step, first, length=_STEPS)[0][3]

    return run(x)


def _bilinear(first: np.ndarray, second: np.ndarray, values: np.ndarray, x, y) -> Array:
    """As the simulator interpolates; differentiable in `x` and `y`."""
    rows = _line(first, x)
    columns = _line(second, y)
    table = jnp.asarray(values, jnp.float32)
    found = 0.0
    for i, a in rows:
        for j, b in columns:
            found = found + a * b * table[i, j]
    return jnp.asarray(found)


def _line(nodes: np.ndarray, x):
    """The nodes around `x` and their weights; beyond the last one the slope goes on."""
    axis = jnp.asarray(nodes, jnp.float32)
    x = jnp.asarray(x, jnp.float32)
    if len(nodes) == 1:
        return [(0, 1.0)]
    i = jnp.clip(jnp.searchsorted(axis, x, side="right") - 1, 0, len(nodes) - 2)
    above = jnp.maximum((x - axis[i]) / (axis[i + 1] - axis[i]), 0.0)
    return [(i, 1 - above), (i + 1, above)]
