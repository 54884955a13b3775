"""Placement by gradient: relax, descend the priced objective while it anneals, round, search.

Every layer has two relaxed choices, X[e, r] being the chance that expert e has a copy on rank r:

    copies   c[e]    = 1 + redundant · softmax(φ)[e]                      (sums to the slots)
    places   X[e, r] = 1 / (1 + exp(-θ[e, r] - α[e] - β[r]))              (between 0 and 1)

with α and β such that rows sum to c and columns to the slots of a rank: entropic assignment with
capacities, each rank holding an expert at most once. An even split sends X[e, r] / c[e] of expert
e's tokens to rank r. A uniform X is balanced and places nothing, so what is descended is the price
of a random rounding of X: with loads a relative to a rank's mean, tokens have mean and variance

    μ[w, r] = sum over e of a[w, e] / c[e] · X[e, r]
    v[w, r] = sum over e of (a[w, e] / c[e])² · X[e, r] · (1 - X[e, r])

and the slowest rank, taken as Gaussian, has no more than (Jensen's inequality, any s > 0)

    top[w] = log( sum over r of exp(s μ[w, r] + s² v[w, r] / 2) ) / s.

The layer's price at `top`, sorted softly over the windows (Prillo and Eisenschlos, "SoftSort",
2020) and weighted as the objective weighs them, is what Adam lowers in θ and φ for all layers and
restarts at once while s rises. Its gradient sees all workloads and all copies together. Rounded
plans (`rounding`) go through the same exact search as the method `search`, beside the covering
copies that it starts from too.

For the worst of 12 workloads, 58 layers of 256 experts (`python -m studies.placement --robust`), it
ends 0.5 % below `search` from as many plans at 320 slots on 160 ranks and within 0.15 % of it at 288
on 32, 288 on 72 and 320 on 64, in about the same CPU time; `search` is therefore the default.
"""

import time
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from cmjax.placement.plan import Plan, count_copies
from cmjax.placement.pricing import LayerTime
from cmjax.placement.problem import Problem
from cmjax.placement.rounding import round_copies, round_places
from cmjax.placement.search import (
    Incumbent,
    OnStep,
    SearchConfig,
    consider_rules,
    covering,
    improve_plans,
    relative_loads,
)

_BREADTH = 0.3  # standard deviation of the first θ: restarts differ, and ranks within one
_TIE = 1e-3  # weight of the slowest rank's tokens where the price itself is flat


@dataclass(frozen=True)
class GradientConfig:
    """How long the relaxation runs.

    Attributes:
      restarts: relaxed plans per layer.
      steps: Adam steps.
      chunk: steps between two looks at the clock.
      learning_rate: Adam's, of θ; φ moves at `copies_rate` times that.
      copies_rate: see there.
      sharpness: s at the first and last step.
      wish: what a decided place outweighs in the rounding, in units of a rank's mean tokens.
      search: the exact search that follows.
    """

    restarts: int = 1
    steps: int = 40
    chunk: int = 10
    learning_rate: float = 0.2
    copies_rate: float = 0.1
    sharpness: tuple[float, float] = (5.0, 60.0)
    wish: float = 0.01
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self):
        for name in ("restarts", "steps", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"GradientConfig: {name} must be at least 1, got {getattr(self, name)}"
                )


def gradient(
    problem: Problem,
    layer_time_s: LayerTime,
    *,
    seed: int = 0,
    seconds: float | None = None,
    on_step: OnStep | None = None,
    config: GradientConfig | None = None,
) -> Plan:
    """Place experts by a relaxation, descended by gradient, and an exact search from its rounding.

    Args:
      problem: loads, ranks, slots and objective; every slot usable (`Problem.dense`).
      layer_time_s: the priced layer, see `pricing`; it is differentiated.
      seed: of the restarts and the search. The same seed gives the same plan, unless `seconds` cut
        the run short.
      seconds: wall-clock limit as in `search`; the relaxation may use a third of it.
      on_step: called as `on_step(done, total, best)` by the search; `best` is in seconds.
      config: see `GradientConfig`.
    Returns: the best plan found; also on Ctrl-C, then the best so far.
    """
    config = config or GradientConfig()
    begin = time.monotonic()
    limit = np.inf if seconds is None else seconds
    best = Incumbent(problem, layer_time_s)
    consider_rules(best)
    try:
        if problem.ranks > 1:
            relaxed = relax_and_round(
                problem, layer_time_s, seed=seed, deadline=begin + limit / 3, config=config
            )
            best.consider(relaxed)
            plans = np.concatenate([covering(problem), relaxed])
            improve_plans(
                best, plans, seed=seed, deadline=begin + limit, on_step=on_step,
                config=config.search,
            )  # fmt: skip
    except KeyboardInterrupt:
        pass
    return problem.plan(best.experts)


def relax_and_round(
    problem: Problem,
    layer_time_s: LayerTime,
    *,
    seed: int = 0,
    deadline: float = np.inf,
    config: GradientConfig | None = None,
) -> np.ndarray:
    """Rounded plans [restarts, layers, slots] of the relaxation alone, without any search.

    Args: as in `gradient`; `deadline` is a time of `time.monotonic`, looked at between chunks.
    """
    config = config or GradientConfig()
    layers, experts, ranks = problem.layers, problem.experts, problem.ranks
    rows = config.restarts * layers
    loads = np.tile(relative_loads(problem).transpose(1, 0, 2), (config.restarts, 1, 1))
    unit = problem.loads.counts.sum(-1).T / ranks  # tokens of a rank's mean, [layers, windows]
    whole = count_copies(covering(problem)[0], experts)
    spare = np.tile(whole - 1 + 1 / experts, (config.restarts, 1))
    key = jax.random.key(seed)
    state = _start(
        jnp.asarray(np.log(spare), jnp.float32),
        _BREADTH * jax.random.normal(key, (rows, experts, ranks)),
        jnp.asarray(spare + 1, jnp.float32),
    )
    first, last = config.sharpness
    schedule = first * (last / first) ** np.linspace(0, 1, config.steps)
    a = jnp.asarray(loads, jnp.float32)
    units = jnp.asarray(np.tile(unit, (config.restarts, 1)), jnp.float32)
    static = {
        "slots": problem.slots, "price": layer_time_s, "risk": problem.objective,
        "rates": (config.learning_rate, config.learning_rate * config.copies_rate),
    }  # fmt: skip
    for at in range(0, config.steps, config.chunk):
        if at and time.monotonic() >= deadline:
            break
        part = jnp.asarray(schedule[at : at + config.chunk], jnp.float32)
        state = _descend(state, a, units, part, **static)
    copies = round_copies(np.asarray(_copies(state.phi, problem.slots)), problem.slots, ranks)
    wishes = _settle(state, jnp.asarray(copies, jnp.float32), slots=problem.slots)
    placed = round_places(copies, loads, ranks, wishes, wish=config.wish)
    return placed.reshape(config.restarts, layers, -1)


def relaxed_cost(
    places: Float[Array, "experts ranks"],
    copies: Float[Array, "experts"],
    loads: Float[Array, "windows experts"],
    unit: Float[Array, "windows"],
    sharpness: float | Array,
    *,
    price: LayerTime,
    risk,
) -> Float[Array, ""]:
    """The objective of one layer's relaxed plan, smooth in places and copies.

    Args:
      places: X, the chance of a copy of each expert on each rank.
      copies: c, the sum of its rows.
      loads: tokens of each expert over the mean tokens of a rank.
      unit: that mean, in tokens.
      sharpness: s; the larger, the nearer to the slowest rank and the sharpest order of windows.
      price: the priced layer.
      risk: the objective over windows.
    Returns: price over what a rank's mean tokens more would cost; 0 at perfect balance.
    """
    share = loads / copies
    spread = jnp.square(share) @ (places * (1 - places))
    exponent = sharpness * (share @ places) + 0.5 * sharpness**2 * spread
    top = jax.nn.logsumexp(exponent, axis=-1) / sharpness
    ranks = places.shape[1]

    def priced(tokens):
        return price(jnp.broadcast_to((tokens * unit)[:, None], (len(unit), ranks)))

    base = priced(jnp.ones_like(top))
    scale = jnp.maximum((priced(2 * jnp.ones_like(top)) - base).mean(), _TIE * base.mean())
    cost = (priced(top) - base) / scale + _TIE * top
    ordered = -jnp.sort(-cost)
    nearness = jax.nn.softmax(-sharpness * jnp.abs(ordered[:, None] - cost), axis=-1)
    return jnp.asarray(risk.weights(len(unit)), cost.dtype) @ (nearness @ cost)


def soft_places(
    theta: Float[Array, "experts ranks"],
    copies: Float[Array, "experts"],
    size: float | Array,
    alpha: Float[Array, "experts"],
    beta: Float[Array, "ranks"],
    *,
    sweeps: int,
) -> tuple[Float[Array, "experts ranks"], Float[Array, "experts"], Float[Array, "ranks"]]:
    """X with row sums `copies` and column sums `size`, and its α and β: Newton steps from given."""

    def chance(alpha, beta):
        return jax.nn.sigmoid(theta + alpha[:, None] + beta)

    def step(x, wanted, axis):
        total = x.sum(axis)
        # Where all is decided the curvature vanishes; a floor keeps the step sane.
        return jnp.clip((wanted - total) / ((x * (1 - x)).sum(axis) + 1e-3 * total), -1, 1)

    def sweep(_, fitted):
        alpha, beta = fitted
        alpha = alpha + step(chance(alpha, beta), copies, 1)
        return alpha, beta + step(chance(alpha, beta), size, 0)

    alpha, beta = jax.lax.fori_loop(0, sweeps, sweep, (alpha, beta))
    return chance(alpha, beta), alpha, beta


def project(
    slope: Float[Array, "experts ranks"], places: Float[Array, "experts ranks"], *, sweeps: int = 2
) -> Float[Array, "experts ranks"]:
    """∂cost/∂θ at fixed copies from ∂cost/∂X: α and β undo what changes a row's or column's sum."""
    weight = places * (1 - places) + 1e-9

    def sweep(_, slope):
        slope = slope - (weight * slope).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
        return slope - (weight * slope).sum(0) / weight.sum(0)

    return weight * jax.lax.fori_loop(0, sweeps, sweep, slope)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Leading axis: restarts times layers."""

    theta: Array
    phi: Array
    alpha: Array
    beta: Array
    adam: optax.OptState


_ADAM = optax.scale_by_adam(b1=0.8, b2=0.95)


def _start(phi, theta, copies):
    alpha = jnp.log(copies / theta.shape[-1])
    beta = jnp.zeros((len(theta), theta.shape[-1]))
    return _State(theta, phi, alpha, beta, jax.vmap(_ADAM.init)((theta, phi)))


def _copies(phi, slots):
    return 1 + (slots - phi.shape[-1]) * jax.nn.softmax(phi)


@partial(jax.jit, static_argnames=("slots", "price", "risk", "rates"))
def _descend(state, loads, unit, schedule, *, slots, price, risk, rates):
    """Adam steps on all rows, one per sharpness of the schedule."""

    def one(state, loads, unit, sharpness):
        size = slots / state.theta.shape[-1]
        copies = _copies(state.phi, slots)
        x, alpha, beta = soft_places(
            state.theta, copies, size, state.alpha, state.beta, sweeps=1
        )  # fmt: skip
        share = x / copies[:, None]

        def cost(share, phi):
            # More copies of an expert, in the same proportions over the ranks.
            copies = _copies(phi, slots)
            return relaxed_cost(
                share * copies[:, None], copies, loads, unit, sharpness, price=price, risk=risk
            )

        slope, by_phi = jax.grad(cost, (0, 1))(share, state.phi)
        by_theta = project(slope / copies[:, None], x)
        updates, adam = _ADAM.update((by_theta, by_phi), state.adam)
        theta, phi = (
            value - rate * update
            for value, rate, update in zip(
                (state.theta, state.phi), rates, updates, strict=True
            )
        )  # fmt: skip
        return _State(theta, phi, alpha, beta, adam)

    def step(state, sharpness):
        return jax.vmap(one, (0, 0, 0, None))(state, loads, unit, sharpness), None

    return jax.lax.scan(step, state, schedule)[0]


@partial(jax.jit, static_argnames="slots")
def _settle(state, copies, *, slots):
    """X for whole copies."""

    def one(theta, copies, alpha, beta):
        return soft_places(theta, copies, slots / len(beta), alpha, beta, sweeps=6)[0]

    return jax.vmap(one)(state.theta, copies, state.alpha, state.beta)
