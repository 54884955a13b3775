"""Placement by gradient: relax, descend the priced time while it cools, round, search exactly.

Every layer and every restart moves in one compiled program (`relaxation.py`): Adam on the relaxed
plan, temperature and smoothing falling geometrically. Half-way the copies are rounded and held, so
that the places settle around whole copies. Then the plans are rounded (`rounding.py`) and improved
by exact moves (`local_search.py`). Restart 0 starts from the greedy plan, and the greedy and
contiguous plans themselves stay in the contest: the answer is, layer by layer, the best of all, so
it is never worse than either.

On the loads tried so far the exact search brings nearly all of the gain over greedy: restarts that
skip the descent (`steps=0`) end within the spread of seeds of restarts that descend.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from cmjax.placement.contiguous import contiguous
from cmjax.placement.evaluate import lower_bound_time_s
from cmjax.placement.greedy import greedy
from cmjax.placement.local_search import DRAWS, descend
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Plan, Problem
from cmjax.placement.relaxation import RelaxedPlan, relaxed_cost, soft_copies, soft_places
from cmjax.placement.rounding import round_copies, round_places

OnStep = Callable[[int, int, float], None]

_MOVES_BUDGET = 2**22  # numbers in flight in a search step: about 16 MB of single precision


@dataclass(frozen=True)
class GradientConfig:
    """How long and how hot the optimiser runs.

    Attributes:
      restarts: relaxed plans per layer; the first starts from greedy, the others at random.
      steps: Adam steps.
      learning_rate: Adam's.
      temperatures: Sinkhorn temperature at the first and last step.
      smoothings: relative perturbation of the tokens at the first and last step.
      samples: perturbations averaged per step.
      search_steps: local search steps at most; it stops early when nothing improves.
      chunk: steps between two looks at the clock.
    """

    restarts: int = 3
    steps: int = 120
    learning_rate: float = 0.05
    temperatures: tuple[float, float] = (0.5, 0.05)
    smoothings: tuple[float, float] = (0.1, 0.005)
    samples: int = 4
    search_steps: int = 600
    chunk: int = 20

    def __post_init__(self):
        for name in ("restarts", "samples", "chunk"):
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
    """Place experts to minimise the priced time, mean over windows, summed over layers.

    Args:
      problem: loads, ranks and slots.
      layer_time_s: the priced layer, `[..., ranks]` tokens to `[...]` seconds; see `pricing`. The
        compiled program is kept for the next call with the same callable.
      seed: of the restarts and the search. The same seed gives the same plan, unless `seconds` cut
        the run short.
      seconds: wall-clock limit, compilation included; a chunk of steps is finished once begun.
      on_step: called as `on_step(done, total, best)`; `best` is the priced time so far, in seconds.
      config: see `GradientConfig`.
    Returns: the best plan found; also on Ctrl-C, then the best so far.
    """
    config = config or GradientConfig()
    if not isinstance(layer_time_s, Hashable):
        layer_time_s = partial(_call, layer_time_s)  # jit keys its programs by hashable callables
    deadline = np.inf if seconds is None else time.monotonic() + seconds
    incumbent = _Incumbent(problem, layer_time_s, on_step, config.steps + config.search_steps)
    start = greedy(problem)
    for plan in (start, contiguous(problem)):
        incumbent.consider(plan.experts[None])
    try:
        rng = np.random.default_rng(seed)
        scale_s = np.maximum(lower_bound_time_s(problem, layer_time_s).mean(0), 1e-30)
        shared = _Shared(
            counts=jnp.asarray(problem.loads.counts, jnp.float32),
            scale_s=jnp.asarray(scale_s, jnp.float32),
        )
        half = deadline if seconds is None else deadline - seconds / 2
        rounded = _relax_and_round(
            problem, layer_time_s, start, shared, rng, half, config, incumbent
        )
        incumbent.consider(rounded)
        plans = np.concatenate([start.experts[None], rounded])
        _search(problem, layer_time_s, plans, shared, rng, deadline, config, incumbent)
    except KeyboardInterrupt:
        pass
    return problem.plan(incumbent.experts)


def _call(function, argument):
    return function(argument)


@dataclass(frozen=True)
class _Shared:
    counts: jax.Array
    scale_s: jax.Array


class _Incumbent:
    """The best plan so far of every layer, by exact price in double precision."""

    def __init__(self, problem, layer_time_s, on_step, total):
        self.experts = np.zeros((problem.layers, problem.slots), np.int32)
        self._time_s = np.full(problem.layers, np.inf)
        self._problem, self._layer_time_s = problem, layer_time_s
        self._on_step, self._done, self._total = on_step, 0, total

    def consider(self, plans: Int[np.ndarray, "plans layers slots"]) -> None:
        for experts in plans:
            tokens = self._problem.plan(experts).tokens_per_rank(self._problem.loads.counts)
            time_s = price_s(self._layer_time_s, tokens).mean(0)
            better = time_s < self._time_s
            self._time_s = np.where(better, time_s, self._time_s)
            self.experts = np.where(better[:, None], experts, self.experts)

    @property
    def time_s(self) -> float:
        return float(self._time_s.sum())

    def report(self, steps: int) -> None:
        self._done += steps
        if self._on_step is not None:
            self._on_step(self._done, self._total, self.time_s)


def _relax_and_round(problem, layer_time_s, start, shared, rng, deadline, config, incumbent):
    """Anneal the relaxed plans and round them: [restarts, layers, slots]."""
    state = _initial(problem, start, rng, config)
    optimiser = optax.adam(config.learning_rate)
    moments = optimiser.init(cast(optax.Params, state))
    fixed = jnp.ones_like(state.copies)
    step = partial(
        _anneal, slots=problem.slots, rate=config.learning_rate, layer_time_s=layer_time_s
    )
    progress = np.linspace(0, 1, config.steps)
    temperatures = _geometric(config.temperatures, progress)
    smoothings = _geometric(config.smoothings, progress)
    samples = (config.samples, problem.loads.counts.shape[0], problem.ranks)
    begin, held = 0, False
    while begin < config.steps and time.monotonic() < deadline:
        end = min(begin + config.chunk, config.steps)
        if not held and begin >= config.steps / 2:
            fixed, held = jnp.asarray(_whole_copies(problem, state), jnp.float32), True
        schedule = jnp.asarray(
            np.stack([temperatures[begin:end], smoothings[begin:end]], -1), jnp.float32
        )
        state, moments = step(
            state, moments, shared.counts, shared.scale_s, fixed, float(held), schedule,
            jnp.asarray(rng.standard_normal((end - begin, *samples)), jnp.float32),
        )  # fmt: skip
        jax.block_until_ready(state)
        incumbent.report(end - begin)
        begin = end
    incumbent.report(config.steps - begin)
    copies = np.asarray(fixed, np.int64) if held else _whole_copies(problem, state)
    wishes = _cooled(state.places, jnp.asarray(copies, jnp.float32), config.temperatures[1])
    rows = config.restarts * problem.layers
    loads = np.tile(problem.loads.counts.mean(0), (config.restarts, 1))
    placed = round_places(
        np.asarray(wishes, np.float64).reshape(rows, problem.experts, problem.ranks),
        copies.reshape(rows, -1),
        loads,
    )
    return placed.reshape(config.restarts, problem.layers, -1)


def _search(problem, layer_time_s, plans, shared, rng, deadline, config, incumbent):
    """Local search from every plan until the steps, the clock or the improvements run out."""
    work = plans.shape[0] * problem.layers * shared.counts.shape[0] * problem.ranks
    moves = int(np.clip(_MOVES_BUDGET // work, 16, 256))
    done, stalled = 0, 0
    while done < config.search_steps and stalled < 3 and time.monotonic() < deadline:
        before = incumbent.time_s
        draws = rng.random((*plans.shape[:2], config.chunk, DRAWS, moves), np.float32)
        plans = np.asarray(
            descend(
                jnp.asarray(plans), shared.counts, shared.scale_s, jnp.asarray(draws),
                ranks=problem.ranks, layer_time_s=layer_time_s,
            )
        )  # fmt: skip
        incumbent.consider(plans)
        stalled = stalled + 1 if incumbent.time_s >= before * (1 - 1e-6) else 0
        done += config.chunk
        incumbent.report(config.chunk)
    incumbent.report(max(config.search_steps - done, 0))


def _initial(problem, start, rng, config) -> RelaxedPlan:
    """Restart 0 near the greedy plan; the others random, with copies in proportion to load."""
    layers, experts, ranks = problem.layers, problem.experts, problem.ranks
    spread = np.zeros((layers, experts, ranks), np.float32)
    home = np.arange(problem.slots) // problem.slots_per_rank
    np.maximum.at(spread, (np.arange(layers)[:, None], start.experts, home), 1.0)
    places = 0.3 * rng.standard_normal((config.restarts, *spread.shape), np.float32)
    places[0] = spread + places[0] / 3
    extra = np.maximum(start.copies - 1.0, 0.05).astype(np.float32)
    jitter = 0.3 * rng.standard_normal((config.restarts, *extra.shape), np.float32)
    jitter[0] = 0
    return RelaxedPlan(places=jnp.asarray(places), copies=jnp.asarray(np.log(extra) + jitter))


@partial(jax.jit, static_argnames=("slots", "rate", "layer_time_s"))
def _anneal(
    state,
    moments,
    counts,
    scale_s,
    fixed,
    use_fixed,
    schedule,
    noise,
    *,
    slots,
    rate,
    layer_time_s,
):
    """Adam steps down a schedule [steps, (temperature, smoothing)], with noise for every step."""
    optimiser = optax.adam(rate)
    cost = partial(relaxed_cost, slots=slots, layer_time_s=layer_time_s)
    by_layer = jax.vmap(cost, (0, 1, 0, 0, None, None, None, None))
    by_restart = jax.vmap(by_layer, (0, None, None, 0, None, None, None, None))

    def step(carry, inputs):
        state, moments = carry
        (temperature, smoothing), noise = inputs

        def total(state):
            return by_restart(
                state, counts, scale_s, fixed, use_fixed, temperature, smoothing, noise
            ).sum()

        updates, moments = optimiser.update(jax.grad(total)(state), moments)
        return (optax.apply_updates(state, updates), moments), None

    (state, moments), _ = jax.lax.scan(step, (state, moments), (schedule, noise))
    return state, moments


@jax.jit
def _cooled(places, copies, temperature):
    by_layer = jax.vmap(soft_places, (0, 0, None))
    return jax.vmap(by_layer, (0, 0, None))(places, copies, temperature)


def _whole_copies(problem, state) -> Int[np.ndarray, "restarts layers experts"]:
    soft = np.asarray(soft_copies(state, problem.slots), np.float64)
    whole = round_copies(soft.reshape(-1, problem.experts), problem.slots, problem.ranks)
    return whole.reshape(soft.shape)


def _geometric(ends, progress) -> Float[np.ndarray, "steps"]:
    return ends[0] * (ends[1] / ends[0]) ** progress
