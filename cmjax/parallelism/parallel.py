"""The face of the planner: a model on a machine, and the plans that train it fastest."""

import difflib
from pathlib import Path

from cmjax.hardware import Supernode, as_machine
from cmjax.models.dense import PRESETS as DENSE
from cmjax.models.dense import DenseConfig, preset
from cmjax.models.moe.presets import PRESETS as MIXTURES
from cmjax.parallelism.expert_pieces import MoETraining
from cmjax.parallelism.experts import price_experts, search_experts
from cmjax.parallelism.plan import Plan, parse_plan
from cmjax.parallelism.result import ParallelPlans
from cmjax.parallelism.search import price_plan, search


def parallel(
    model: DenseConfig | MoETraining | str,
    machine: Supernode | str | Path = "cloudmatrix384",
    /,
    *,
    devices: int | None = None,
    global_batch: int = 512,
    plan: Plan | str | None = None,
    top: int = 5,
    overlap: bool = True,
) -> ParallelPlans:
    """How to split the training of a model over a machine: search, or price one plan.

    Args:
      model: sizes, or the name of a dense decoder (`cmjax.models.dense.PRESETS`) or a mixture of
        experts (`cmjax.models.moe.config.PRESETS`, on sequences of 4,096 tokens).
      machine: a `Supernode`, the name of one in the catalog, or a `.toml` file.
      devices: how many ranks are used; all of them by default, or as many as `plan` has.
      global_batch: sequences of a step.
      plan: price this one (`"data=16,tensor=8,pipeline=16,optimizer=zero1"`) in place of a search.
      top: plans that a search returns.
      overlap: whether a search may reduce gradients during the backward pass.
    Returns: plans, fastest first; all of them fit.
    Raises: ValueError: an unknown name, degrees that do not divide, no plan that fits.

    >>> import cmjax
    >>> found = cmjax.parallel("pangu-2.6b", "ascend910-2048", plan="data=64,tensor=8")
    >>> f"{found.best.memory.peak / 2**30:.1f} GiB a device"
    '5.8 GiB a device'
    """
    sizes = named(model) if isinstance(model, str) else model
    machine = as_machine(machine)
    if global_batch < 1 or top < 1:
        raise ValueError(f"global_batch and top must be at least 1, got {global_batch} and {top}")
    if plan is not None:
        plan = parse_plan(plan) if isinstance(plan, str) else plan
        if devices is not None and devices != plan.devices:
            raise ValueError(f"plan: its degrees make {plan.devices} devices, not {devices}")
        devices, considered, feasible = plan.devices, 1, 1
        if isinstance(sizes, MoETraining):
            plans = (price_experts(sizes, machine, plan, global_batch),)
        else:
            plans = (price_plan(sizes, machine, plan, global_batch),)
    else:
        devices = machine.ranks if devices is None else devices
        options = {"top": top, "overlap": overlap}
        if isinstance(sizes, MoETraining):
            found = search_experts(sizes, machine, devices, global_batch, **options)
        else:
            found = search(sizes, machine, devices, global_batch, **options)
        plans, considered, feasible = found.plans, found.considered, found.feasible
    return ParallelPlans(
        model=model if isinstance(model, str) else _OTHERS[type(sizes)],
        machine=machine.name,
        devices=devices,
        global_batch=global_batch,
        sequence=sizes.sequence,
        parameters=sizes.parameters,
        plans=plans,
        considered=considered,
        feasible=feasible,
    )


_OTHERS = {DenseConfig: "a dense decoder", MoETraining: "a mixture of experts"}
SEQUENCE = 4096
"""Tokens that a mixture of experts is trained on at a time, where nothing else is said."""


def named(name: str) -> DenseConfig | MoETraining:
    """What a preset trains.

    Raises: ValueError: unknown name, with the closest ones.
    """
    if name in DENSE:
        return preset(name)
    mixtures = [each for each, made in MIXTURES.items() if not made().dense]
    if name in mixtures:
        return MoETraining(model=MIXTURES[name](), sequence=SEQUENCE)
    close = difflib.get_close_matches(name, [*DENSE, *mixtures], n=2) or [*DENSE]
    raise ValueError(f"unknown model {name!r}; closest: {', '.join(close)}")
