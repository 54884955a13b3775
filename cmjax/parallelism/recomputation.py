"""Which layers are recomputed, and where stages begin: the fewest seconds that leave every stage's
memory within its device's.

    min  f t_full + s t_selective     over  f + s <= n,  held(f, s) <= usable

Layers of a kind cost alike, and a step grows with the time of every stage: what n layers of a
stage recompute is chosen by itself, and trying all numbers is exact. Stages differ by the
micro-batches that they hold in flight, and by what else they compute; how many layers they have is
for `boundaries.divisions` to say (AdaPipe, ASPLOS 2024, chooses both, by dynamic programming).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from cmjax.models.dense import DenseConfig
from cmjax.parallelism.boundaries import Waits, divisions
from cmjax.parallelism.layerwise import Counts, shortest
from cmjax.parallelism.memory import stage_memory
from cmjax.parallelism.plan import Plan
from cmjax.parallelism.schedules import in_flight

StageSeconds = Callable[[int, Counts], np.ndarray]
"""Seconds of a micro-batch on a stage, for every one of the counts."""


def fewest_recomputed(
    model: DenseConfig, plan: Plan, global_batch: int, usable: float, seconds: StageSeconds
) -> Plan | None:
    """The plan with the fastest recomputation of every stage that fits; `None` if none does.

    Args:
      plan: divides (`Plan.check`); its `recompute` is not read.
      usable: bytes of a device.
    """
    best = _Best(model, plan, global_batch, usable, seconds)
    division = plan.stages(model.layers)
    return None if any(best(s, n)[1] is None for s, n in enumerate(division)) else best.of(division)


def fastest_stages(
    model: DenseConfig,
    plan: Plan,
    global_batch: int,
    usable: float,
    seconds: StageSeconds | None = None,
    *,
    at_least: StageSeconds,
    waited: float,
) -> list[Plan]:
    """Plans with the fastest boundaries between stages and recomputation: the first has as few
    layers on its fullest stage as can be, the next ones more, by which their pipelines are faster.

    Args:
      plan: its `layers` and `recompute` are not read; otherwise as `fewest_recomputed` takes it.
      at_least: a lower bound of `seconds`, by which choices are left out unseen; without
        `seconds`, stages are chosen by it.
      waited: of the seconds of stages but the slowest, what a step waits for.
    """
    plan = dataclasses.replace(plan, layers=(), recompute="none")
    bounds = None if seconds is None else at_least
    best = _Best(model, plan, global_batch, usable, seconds or at_least, bounds)
    one, two = (float(at_least(0, Counts(n, 0, 0))) for n in (1, 2))
    waits = Waits(slowest=plan.micro_batches(global_batch) - waited, total=waited)
    chunk = model.layers // plan.interleave
    return [best.of(n) for n in divisions(chunk, plan.pipeline, waits, best, two - one)]


class _Best:
    """What stages take at best, by their numbers of layers."""

    def __init__(
        self,
        model: DenseConfig,
        plan: Plan,
        global_batch: int,
        usable: float,
        seconds: StageSeconds,
        at_least: StageSeconds | None = None,
    ):
        self.model, self.plan, self.usable = model, plan, usable
        self.seconds, self.at_least = seconds, at_least
        unread = {"recompute": "none", "layers": (), "order": Plan().order, "overlap": False}
        alike = dataclasses.replace(plan, **unread)
        self.peaks = functools.partial(_peaks, model, alike, global_batch)
        self.known: dict[tuple[int, int], tuple[float, Counts | None]] = {}
        # Stages between the ends that hold as many micro-batches are alike.
        m, first = plan.micro_batches(global_batch), dict[tuple[float, int], int]()
        self.like = [
            first.setdefault(
                (in_flight(plan.schedule, m, plan.pipeline, plan.interleave, stage),
                 (stage == 0) - (stage == plan.pipeline - 1)), stage
            )
            for stage in range(plan.pipeline)
        ]  # fmt: skip

    def __call__(self, stage: int, layers: int) -> tuple[float, Counts | None]:
        key = self.like[stage], layers
        if key not in self.known:
            self.known[key] = self._found(*key)
        return self.known[key]

    def _found(self, stage: int, layers: int) -> tuple[float, Counts | None]:
        fitting = _some(_choices(layers), self.peaks(stage, layers) <= self.usable)
        if not len(fitting.full):
            return np.inf, None
        if self.at_least is not None:
            bounds = self.at_least(stage, fitting)
            likely = int(np.argmin(bounds))
            known = self.seconds(stage, _some(fitting, [likely]))
            fitting = _some(fitting, bounds <= known)
        seconds = self.seconds(stage, fitting)
        best = int(np.argmin(seconds))
        counts = Counts(layers, int(fitting.full[best]), int(fitting.selective[best]))
        return float(seconds[best]), counts

    def of(self, division: tuple[int, ...]) -> Plan:
        """The plan whose stages have so many layers, all of which fit."""
        found = [self(stage, n)[1] for stage, n in enumerate(division)]
        counts = [each for each in found if each is not None]
        even = dataclasses.replace(self.plan, layers=()).stages(self.model.layers)
        layers = () if division == even else division
        return dataclasses.replace(self.plan, layers=layers, recompute=shortest(counts))


@functools.lru_cache(maxsize=512)
def _choices(layers: int) -> Counts:
    """All numbers of a chunk's layers."""
    full, selective = np.indices((layers + 1, layers + 1))
    some = full + selective <= layers
    return Counts(layers, full[some], selective[some])


def _some(choices: Counts, which) -> Counts:
    return Counts(choices.layers, choices.full[which], choices.selective[which])


@functools.lru_cache(maxsize=2**16)
def _peaks(
    model: DenseConfig, plan: Plan, global_batch: int, stage: int, layers: int
) -> np.ndarray:
    """Bytes of a stage's device, for all choices."""
    return np.asarray(stage_memory(model, plan, global_batch, stage, _choices(layers)).peak)
