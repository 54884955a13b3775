"""The face of a prediction: a model on a machine under requests, in one call."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from cmjax import placement
from cmjax.cost.load import imbalance
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.place_options import LoadsLike, Recording
from cmjax.deploy.placed import as_loads, on_nodes
from cmjax.deploy.prediction import Prediction, fastest
from cmjax.deploy.predictor import Predictor
from cmjax.deploy.requests import Requests
from cmjax.deploy.step import MoEStep
from cmjax.deploy.width import explain
from cmjax.hardware import Supernode, as_machine
from cmjax.inputs import check_number
from cmjax.models.moe.checkpoint.hf_config import load_config
from cmjax.models.moe.slots import SlotTable, ep_table, plan_tables, published_table
from cmjax.placement import Loads, Plan

_DEPLOYMENT = {field.name for field in dataclasses.fields(Deployment)}
_REQUESTS = {field.name for field in dataclasses.fields(Requests)}


def predict(
    model: str | Deployment,
    machine: Supernode | str | Path = "cloudmatrix384",
    requests: Requests | None = None,
    *,
    loads: LoadsLike | None = None,
    plan: Plan | str | Path | None = None,
    slo_tpot_ms: float | None = None,
    **options: Any,
) -> Prediction:
    """Predict a serving instance: step time, TPOT or TTFT, tokens per second and NPU.

    Args:
      model: preset name or path of a Hugging Face `config.json`; or a whole `Deployment`.
      machine: a `Supernode`, the name of one in the catalog, or a `.toml` file. Its constants may
        be traced by JAX.
      requests: what is served; or give its fields as options.
      loads: recorded expert counts, of which the slowest rank is found: a file that `place` reads,
        `[layers, experts]` or `[windows, layers, experts]`, or `Loads`. Without them all ranks
        expect equal loads, with the scatter of a finite batch.
      plan: where the experts live, of `place` or a file; needs `loads`. Without it, loads are
        placed greedily on the slots of the published deployment.
      slo_tpot_ms: take the largest batch whose TPOT stays within this (decode).
      **options: the fields of `Deployment` (`phase="decode"`, `npus`, `quant`, ...) and of
        `Requests` (`batch`, `prompt`, `output`, `context`, ...), where they are not given whole.
    Returns: a pytree; with `microbatches="auto"` that of the faster number of microbatches.
    Raises: ValueError: an unknown option or model, a deployment that the machine or the requests do
      not allow, loads or a plan of another model.

    >>> import cmjax
    >>> p = cmjax.predict("tiny", phase="decode", npus=8, batch=96, context=4096)
    >>> p.deployment.phase, bool(p.tpot_s > 0), p.fits_hbm
    ('decode', True, True)
    """
    deployment, requests = split_options(model, requests, options)
    machine = as_machine(machine)
    if slo_tpot_ms is not None and not deployment.decoding:
        raise ValueError("slo-tpot-ms applies to decode")
    if isinstance(slo_tpot_ms, int | float):
        check_number("slo-tpot-ms", slo_tpot_ms, above=0)
    if plan is not None and loads is None:
        raise ValueError("plan needs loads: the counts that its experts serve")
    requests.of(deployment)  # what makes no sense is refused before a model is traced
    counts = None if loads is None else as_loads(loads, Recording())
    placed = None if plan is None else _read_plan(plan, deployment, machine)
    table = None if placed is None else plan_table(placed, deployment, machine)
    load, found, predictors, reasons = None, [], [], []
    for choice in deployment.choices():
        try:
            predictor = Predictor.of(choice, machine, table)
            served = requests.of(choice)
            if counts is not None:
                if load is None:  # microbatches do not change which rank is the slowest
                    load = rank_imbalance(counts, predictor.step, placed)
                served = dataclasses.replace(served, load=load)
            if slo_tpot_ms is not None:
                served = predictor.largest_batch(served, slo_tpot_ms)
            prediction = predictor.predict(served)
            found.append(dataclasses.replace(prediction, deployment=deployment))
            predictors.append(predictor)
        except ValueError as error:
            reasons.append(error)
    if not found:
        raise reasons[0]
    best = fastest(found)
    where = [i for i, one in enumerate(found) if one is best]
    return with_interval(best, predictors[where[0]]) if where else best


def with_interval(prediction: Prediction, predictor: Predictor) -> Prediction:
    """A prediction and how sure it is, where its numbers are known."""
    if any(isinstance(x, Tracer) or jnp.ndim(x) for x in jax.tree.leaves(prediction.step_s)):
        return prediction
    intervals = predictor.intervals(prediction)
    if not intervals:
        return prediction
    return dataclasses.replace(
        prediction,
        interval={key: (i.low, i.high) for key, i in intervals.items()},
        elasticities={key: i.elasticity for key, i in intervals.items()},
        width_from=explain(intervals["step_ms"]),
    )


def predictor_of(prediction: Prediction, plan: Plan | None = None) -> Predictor:
    """The traced deployment that made a prediction, for its timeline or its sensitivities."""
    chosen = dataclasses.replace(prediction.deployment, microbatches=int(prediction.microbatches))
    table = None if plan is None else plan_table(plan, chosen, prediction.machine)
    return Predictor.of(chosen, prediction.machine, table)


def rank_imbalance(
    loads: Loads, step: MoEStep, plan: Plan | None = None
) -> Float[np.ndarray, "layers"]:
    """Rows on the slowest rank over the mean, per MoE layer of a step, the mean over windows.

    Args:
      loads: recorded counts. step: of the deployment. plan: where the experts live; without one
        the routed slots of the deployment are filled by greedy replicate-and-pack (ranks that hold
        shared replicas are not the slowest by construction).
    Raises: ValueError: counts of another number of layers or experts.
    """
    found = (loads.layers, loads.experts)
    if found != (step.layers, step.experts):
        raise ValueError(
            f"load {loads.source}: {found[0]} layers x {found[1]} experts; the model has "
            f"{step.layers} MoE layers x {step.experts} experts"
        )
    if plan is None:
        slots_per_rank = step.expert_slots // step.ranks
        ranks = (step.expert_slots - step.shared_slots) // slots_per_rank
        problem = placement.Problem(loads, ranks, ranks * slots_per_rank - step.experts)
        plan = placement.greedy(problem)
    elif plan.experts > loads.experts:
        shared = plan.experts - loads.experts
        loads = placement.with_shared(loads, shared, step.experts_per_token)
    return np.asarray(imbalance(plan.tokens_per_rank(loads.counts.mean(0))))


def plan_table(plan: Plan, deployment: Deployment, machine: Supernode) -> SlotTable | None:
    """The slots of a deployment whose experts live where a plan puts them.

    How many slots there are is what a step's program depends on, and not what they hold: the load
    on the slowest rank says that. `None`, the slots of the published deployment, where
    the plan is for its ranks without shared replicas.
    Raises: ValueError: a plan for another model, or for other ranks.
    """
    config = load_config(deployment.model)
    ranks = _ep_ranks(deployment, machine)
    if deployment.redundant is not None:
        raise ValueError(f"redundant {deployment.redundant}: the plan says how many; leave it out")
    if plan.ranks != ranks:
        published = published_table(config, ranks, phase=deployment.phase)
        routed = published.slots - published.experts_of_slot.count(config.routed_experts)
        if (plan.ranks, plan.slots) == (routed // published.slots_per_rank, routed):
            return None
        raise ValueError(
            f"{plan.source}: a plan for {plan.ranks} ranks; the deployment has {ranks} "
            f"({routed // published.slots_per_rank} of them hold routed experts)"
        )
    slots = plan_tables(plan, config, ranks)[0]
    shared = slots.experts_of_slot.count(config.routed_experts)
    return ep_table(
        config.routed_experts, ranks, slots.slots - config.routed_experts - shared, shared
    )


def _ep_ranks(deployment: Deployment, machine: Supernode) -> int:
    return deployment.ep or deployment.instance_npus * machine.dies_per_npu


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that neither `Deployment` nor `Requests` has."""
    unknown = sorted(set(options) - _DEPLOYMENT - _REQUESTS)
    if unknown:
        known = sorted(_DEPLOYMENT | _REQUESTS)
        close = difflib.get_close_matches(unknown[0], known, n=1) or known
        raise ValueError(f"predict: unknown option {unknown[0]!r}; it takes {', '.join(close)}")


def split_options(model, requests, options) -> tuple[Deployment, Requests]:
    """The deployment and the requests that were given whole or by their fields."""
    check_options(options)
    given = {name: value for name, value in options.items() if name in _DEPLOYMENT}
    if isinstance(model, Deployment):
        deployment = dataclasses.replace(model, **given)
    elif "phase" not in given:
        raise ValueError("predict: phase is needed: 'decode' or 'prefill'")
    else:
        deployment = Deployment(model=str(model), **given)
    fields = {name: value for name, value in options.items() if name in _REQUESTS}
    return deployment, dataclasses.replace(requests or Requests(), **fields)


def _read_plan(plan, deployment: Deployment, machine: Supernode) -> Plan:
    if not isinstance(plan, Plan):
        plan = placement.read_plan(str(plan), ranks=_ep_ranks(deployment, machine))
    return on_nodes(plan, machine)
