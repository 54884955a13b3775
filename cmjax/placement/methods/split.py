"""Shares of an expert's tokens per copy, by gradient: the placement stays, the split moves.

For a given placement the tokens of a rank are linear in the shares, so the smooth maximum

    F = mean over the tail's windows w of  sum over layers of  log( sum_r exp(β x[w, r]) ) / β

is convex in them, with the tail of the objective: all windows for the mean, the slowest for the
worst. Shares are a softmax over the copies of an expert; Adam descends F while β rises. One split
serves all windows, as a router with fixed weights per copy would have it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmjax.placement.methods.incumbent import choose
from cmjax.placement.plan import EMPTY, Plan
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Problem

_SHARPNESS = (10.0, 400.0)  # β at the first and last step, tokens relative to their mean


def optimize_split(
    plan: Plan,
    problem: Problem,
    layer_time_s: LayerTime,
    *,
    steps: int = 300,
    learning_rate: float = 0.05,
) -> Plan:
    """`plan` with shares per copy in the layers where they help; even ones elsewhere.

    Args:
      plan: any plan of the problem.
      problem: loads and objective.
      layer_time_s: the priced layer, which decides what is kept.
      steps: Adam steps.
      learning_rate: Adam's, on the logarithms of the shares.
    """
    counts, objective = problem.loads.counts, problem.objective
    relative = counts / counts.sum(-1, keepdims=True) * len(problem.alive)
    index = np.maximum(plan.expert_of_slot, 0)
    per_slot = np.take_along_axis(
        relative, np.broadcast_to(index, (len(counts), *index.shape)), axis=-1
    )
    filled = plan.expert_of_slot != EMPTY
    logits = _descend(
        jnp.asarray(np.where(filled, per_slot, 0.0), jnp.float32),
        jnp.asarray(index),
        jnp.asarray(filled),
        learning_rate,
        experts=plan.experts, ranks=plan.ranks, steps=steps,
        tail=objective.tail(len(counts)),
    )  # fmt: skip
    share = np.asarray(_shares(logits, index, filled, plan.experts), np.float64)
    # Sums are exact in double precision only after a division there.
    row = plan.experts * np.arange(plan.layers)[:, None] + index
    sums = np.bincount(row.ravel(), share.ravel(), plan.layers * plan.experts)
    share /= sums[row]
    uneven = problem.plan(plan.expert_of_slot, share)
    even = problem.plan(plan.expert_of_slot)
    times = np.stack(
        [price_s(layer_time_s, p.tokens_per_rank(counts))[None] for p in (even, uneven)]
    )
    chosen = choose(times, objective, [np.full(plan.layers, which) for which in (0, 1)])
    return problem.plan(plan.expert_of_slot, np.where(chosen[:, None], share, even.split_of_slot))


def _shares(logits, index, filled, experts):
    weights = jnp.where(filled, jnp.exp(logits), 0.0)
    row = jnp.arange(len(index))[:, None]
    sums = jnp.zeros((len(index), experts), weights.dtype).at[row, index].add(weights)
    return weights / sums[row, index]


@partial(jax.jit, static_argnames=("experts", "ranks", "steps", "tail"))
def _descend(per_slot, index, filled, rate, *, experts, ranks, steps, tail):
    optimizer = optax.adam(rate)

    def cost(logits, sharpness):
        share = _shares(logits, index, filled, experts)
        tokens = (per_slot * share).reshape(*per_slot.shape[:2], ranks, -1).sum(-1)
        top = jax.nn.logsumexp(sharpness * tokens, axis=-1) / sharpness  # [windows, layers]
        return jnp.sort(top.sum(-1))[-tail:].mean()

    def step(carry, sharpness):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(cost)(logits, sharpness), state)
        return (optax.apply_updates(logits, updates), state), None

    first, last = _SHARPNESS
    schedule = first * (last / first) ** jnp.linspace(0, 1, steps)
    logits = jnp.zeros(index.shape, per_slot.dtype)
    (logits, _), _ = jax.lax.scan(step, (logits, optimizer.init(logits)), schedule)
    return logits
