"""Which layers are recomputed: the fewest seconds that leave a stage's memory within its device's.

    min  f t_full + s t_selective     over  f + s <= n,  held(f, s) <= usable

Layers of a kind cost alike, and a step grows with the time of every stage: stages are chosen for
one by one, and trying all numbers is exact. Stages differ by the micro-batches that they hold in
flight (AdaPipe, ASPLOS 2024, chooses alike, by dynamic programming).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from cmjax.models.dense import DenseConfig
from cmjax.parallelism.layerwise import Counts, shortest
from cmjax.parallelism.memory import stage_memory
from cmjax.parallelism.plan import Plan

StageSeconds = Callable[[int, Counts], np.ndarray]
"""Seconds of a micro-batch on a stage, for every one of the counts."""


def fewest_recomputed(
    model: DenseConfig,
    plan: Plan,
    global_batch: int,
    usable: float,
    seconds: StageSeconds,
    at_least: StageSeconds | None = None,
) -> Plan | None:
    """The plan with the fastest recomputation of every stage that fits; `None` if none does.

    Args:
      plan: divides (`Plan.check`); its `recompute` is not read.
      usable: bytes of a device.
      at_least: a lower bound of `seconds`, by which choices are left out unseen.
    """
    layers = model.layers // (plan.pipeline * plan.interleave)
    choices, chosen = _choices(layers), []
    alike = dataclasses.replace(plan, recompute="none", order=Plan().order, overlap=False)
    for stage, held in enumerate(_held(model, alike, global_batch)):
        fitting = _some(choices, held <= usable)
        if not len(fitting.full):
            return None
        if at_least is not None:
            bounds = at_least(stage, fitting)
            likely = int(np.argmin(bounds))
            known = seconds(stage, _some(fitting, [likely]))
            fitting = _some(fitting, bounds <= known)
        best = int(np.argmin(seconds(stage, fitting)))
        chosen.append(Counts(layers, int(fitting.full[best]), int(fitting.selective[best])))
    return dataclasses.replace(plan, recompute=shortest(chosen))


@functools.lru_cache(maxsize=512)
def _choices(layers: int) -> Counts:
    """All numbers of a chunk's layers."""
    full, selective = np.indices((layers + 1, layers + 1))
    some = full + selective <= layers
    return Counts(layers, full[some], selective[some])


def _some(choices: Counts, which) -> Counts:
    return Counts(choices.layers, choices.full[which], choices.selective[which])


@functools.lru_cache(maxsize=4096)
def _held(model: DenseConfig, plan: Plan, global_batch: int) -> list[np.ndarray]:
    """Bytes of every stage's device, for all choices."""
    choices = _choices(model.layers // (plan.pipeline * plan.interleave))
    return [
        np.asarray(stage_memory(model, plan, global_batch, stage, choices).peak)
        for stage in range(plan.pipeline)
    ]
