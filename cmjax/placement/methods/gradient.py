"""Placement by gradient: relax, descend the priced objective while it sharpens, round, search.

Copies and places of every layer are relaxed (`relaxation`); Adam lowers the price of a random
rounding for all layers and restarts at once, in one compiled program,

    θ, φ  <-  Adam( ∂cost(X(θ, c), c; s) ),    c = 1 + redundant · softmax(φ),

while s rises, so that the slowest rank and window come to count alone and X comes to be decided.
Its gradient sees all workloads and all copies together, where a move of the exact search sees two
ranks. Rounded plans (`rounding`) go through that search too, beside the covering copies that the
method `search` starts from. What is relaxed is an even split; the search that follows is exact
under the problem's routing.

For the worst of 12 workloads, 58 layers of 256 experts at 320 slots on 160 ranks (`python -m
studies.placement --robust`), it ends at 1.237 times the mean, `search` at 1.236, which is therefore
the default.
"""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from cmjax.console import Progress
from cmjax.interrupt import Terminated
from cmjax.placement.methods.incumbent import Incumbent
from cmjax.placement.methods.relaxation import project, relaxed_cost, soft_places
from cmjax.placement.methods.rounding import round_copies
from cmjax.placement.methods.search import (
    SearchConfig,
    consider_rules,
    covering,
    improve_plans,
    pack_copies,
    relative_loads,
)
from cmjax.placement.plan import Plan, count_copies
from cmjax.placement.pricing import LayerTime
from cmjax.placement.problem import Problem

_BREADTH = 0.3  # standard deviation of the first θ: restarts differ, and ranks within one


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
    progress: Progress | None = None,
    config: GradientConfig | None = None,
) -> Plan:
    """Place experts by a relaxation, descended by gradient, and an exact search from its rounding.

    Args:
      problem: loads, ranks, slots and objective; every slot usable (`Problem.dense`).
      layer_time_s: the priced layer, see `pricing`; it is differentiated.
      seed: of the restarts and the search. The same seed gives the same plan, unless `seconds` cut
        the run short.
      seconds: wall-clock limit as in `search`; the relaxation may use a third of it.
      progress: told by the search the chunks done, all chunks, and the objective so far.
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
                best, plans, seed=seed, deadline=begin + limit, progress=progress,
                config=config.search,
            )  # fmt: skip
    except Terminated:
        raise
    except KeyboardInterrupt:
        pass
    return problem.plan(best.expert_of_slot)


def relax_and_round(
    problem: Problem,
    layer_time_s: LayerTime,
    *,
    seed: int = 0,
    deadline: float = np.inf,
    config: GradientConfig | None = None,
) -> Int[np.ndarray, "restarts layers slots"]:
    """Rounded plans of the relaxation alone, without any search.

    Args: as in `gradient`; `deadline` is a time of `time.monotonic`, looked at between chunks.
    """
    config = config or GradientConfig()
    layers, experts, ranks = problem.layers, problem.experts, problem.ranks
    rows = config.restarts * layers
    loads = np.tile(relative_loads(problem).transpose(1, 0, 2), (config.restarts, 1, 1))
    unit = problem.loads.counts.sum(-1).T / ranks  # tokens of a rank's mean, [layers, windows]
    whole = count_copies(covering(problem)[0] + 1, experts + 1)[:, 1:]
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
    # jit keys its programs by hashable callables.
    price = layer_time_s if isinstance(layer_time_s, Hashable) else partial(_call, layer_time_s)
    static = {
        "layers": layers, "slots": problem.copies, "price": price, "risk": problem.objective,
        "rates": (config.learning_rate, config.learning_rate * config.copies_rate),
    }  # fmt: skip
    for at in range(0, config.steps, config.chunk):
        if at and time.monotonic() >= deadline:
            break
        part = jnp.asarray(schedule[at : at + config.chunk], jnp.float32)
        state = _descend(state, a, units, part, **static)
    relaxed = np.asarray(_copies(state.phi, problem.copies))
    copies = round_copies(relaxed, problem.copies, ranks)
    wishes = _settle(state, jnp.asarray(copies, jnp.float32), slots=problem.copies)
    placed = pack_copies(problem, copies, wishes, wish=config.wish)
    return placed.reshape(config.restarts, layers, -1)


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


def _call(function, argument):
    return function(argument)


def _copies(phi, slots):
    return 1 + (slots - phi.shape[-1]) * jax.nn.softmax(phi, axis=-1)


@partial(jax.jit, static_argnames=("layers", "slots", "price", "risk", "rates"))
def _descend(state, loads, unit, schedule, *, layers, slots, price, risk, rates):
    """Adam steps on all rows, one per sharpness of the schedule."""

    @jax.vmap
    def places(state):
        copies, size = _copies(state.phi, slots), slots / state.theta.shape[-1]
        return soft_places(state.theta, copies, size, state.alpha, state.beta, sweeps=1)

    @partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
    def cost(share, phi, loads, unit, sharpness):
        # More copies of an expert, in the same proportions over the ranks.
        copies = _copies(phi, slots)
        return relaxed_cost(share * copies[:, None], copies, loads, unit, sharpness, price=price)

    def objective(share, phi, sharpness):
        by_row = cost(share, phi, loads, unit, sharpness)
        restarts = by_row.reshape(-1, layers, by_row.shape[-1]).mean(1)
        slope = jax.vmap(risk.slope, (0, None))(restarts, sharpness)
        return layers * (slope * restarts).sum()

    @jax.vmap
    def move(state, x, slope, by_phi):
        by_theta = project(slope / _copies(state.phi, slots)[:, None], x)
        updates, adam = _ADAM.update((by_theta, by_phi), state.adam)
        theta, phi = jax.tree.map(
            lambda value, rate, update: value - rate * update,
            (state.theta, state.phi), rates, updates,
        )  # fmt: skip
        return replace(state, theta=theta, phi=phi, adam=adam)

    def step(state, sharpness):
        x, alpha, beta = places(state)
        share = x / _copies(state.phi, slots)[..., None]
        slope, by_phi = jax.grad(objective, (0, 1))(share, state.phi, sharpness)
        state = replace(state, alpha=alpha, beta=beta)
        return move(state, x, slope, by_phi), None

    return jax.lax.scan(step, state, schedule)[0]


@partial(jax.jit, static_argnames="slots")
def _settle(state, copies, *, slots):
    """X for whole copies."""

    def one(theta, copies, alpha, beta):
        return soft_places(theta, copies, slots / len(beta), alpha, beta, sweeps=6)[0]

    return jax.vmap(one)(state.theta, copies, state.alpha, state.beta)
