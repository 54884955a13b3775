"""How sure the priced steps of a service are, from the interval of a prediction."""

import functools
import math

import jax

from cmjax.deploy import Predictor, Requests
from cmjax.deploy.deployment import Deployment, Phase
from cmjax.hardware import Supernode
from cmjax.serving.service import Pool, Service

_CONTEXT = 4096.0


def step_spread(service: Service, machine: Supernode) -> dict[str, float]:
    """By pool, the factor s that holds 90 % of what its steps may take: from time / s to time x s.

    Of a full prefill step of two prompts a die, of a decode step of a half-full batch at a context
    of 4,096; of the wider of both where a pool does both. Empty where nothing is known of the
    machine's constants.
    """
    shape, leaves = jax.tree.structure(machine), tuple(map(float, jax.tree.leaves(machine)))
    found = {}
    for name, pool in service.pools.items():
        both: tuple[Phase, Phase] = ("prefill", "decode")
        factors = []
        for phase in both:
            if name in both and phase != name:
                continue
            deployment = service.deployment_for(phase, pool)
            requests = _requests(phase, pool, service, machine)
            factors.append(_factor(deployment, shape, leaves, requests))
        found[name] = max(factors)
    return found if all(factor > 1 for factor in found.values()) else {}


def _requests(phase: Phase, pool: Pool, service: Service, machine: Supernode) -> Requests:
    """An even number on every die, so that they divide over microbatches, too."""
    dies = machine.dies_per_npu
    if phase == "decode":
        half = 2 * max(1, pool.batch // (4 * dies))  # type: ignore[attr-defined]
        return service.requests(batch=float(half * dies), context=_CONTEXT)
    tokens = pool.step_tokens / (pool.npus * dies)  # type: ignore[attr-defined]
    return service.requests(batch=2.0 * dies, prompt=max(1.0, tokens / 2))


@functools.lru_cache(maxsize=64)
def _factor(deployment: Deployment, shape, leaves, requests: Requests) -> float:
    machine = jax.tree.unflatten(shape, leaves)
    predictor = Predictor.of(deployment.choices()[0], machine)
    step = predictor.intervals(predictor.predict(requests)).get("step_ms")
    return math.sqrt(step.high / step.low) if step is not None else 1.0
