"""What a search or a priced plan gives: plans with their time, use of the chips, and memory."""

import dataclasses
from typing import Any, Protocol

from cmjax.console import html_table
from cmjax.parallelism.memory import PARTS, Memory
from cmjax.parallelism.plan import Plan
from cmjax.parallelism.pricing import StepTime
from cmjax.parallelism.schedules import bubble

GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PricedPlan:
    """A plan on a machine.

    Fields:
      plan, time, memory: what it is, what a step takes, what its fullest device holds.
      mfu: FLOP of the model, none of them computed twice, over what the devices could do.
      tokens_per_s_per_device: of training.
      bubble: share of the pipeline's time that equal stages would idle.
    """

    plan: Plan
    time: StepTime
    memory: Memory
    mfu: float
    tokens_per_s_per_device: float
    bubble: float

    @property
    def step_s(self) -> float:
        return self.time.step_s

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        parts = {part: getattr(self.memory, part) / GIB for part in PARTS}
        return {
            "step_s": self.step_s,
            "mfu": self.mfu,
            "tokens_per_s_per_device": self.tokens_per_s_per_device,
            "memory_gib": parts,
            "peak_memory_gib": self.memory.peak / GIB,
            "bubble": self.bubble,
            "seconds": {k: float(v) for k, v in dataclasses.asdict(self.time).items()},
            **self.plan.to_dict(),
            "plan": str(self.plan),
        }


class Trained(Protocol):
    """What a plan trains: tokens of a sequence, and FLOP for one of them, both passes."""

    @property
    def sequence(self) -> int: ...

    def flops_per_token(self) -> float: ...


def priced(
    model: Trained, plan: Plan, global_batch: int, time: StepTime, memory: Memory, peak: float
) -> PricedPlan:
    """Put the numbers of a plan together; `peak` is a device's 16-bit FLOP/s."""
    tokens = global_batch * model.sequence
    flops = tokens * model.flops_per_token()
    return PricedPlan(
        plan=plan,
        time=time,
        memory=memory,
        mfu=flops / (time.step_s * plan.devices * peak),
        tokens_per_s_per_device=tokens / (time.step_s * plan.devices),
        bubble=bubble(
            plan.schedule, plan.micro_batches(global_batch), plan.pipeline, plan.interleave
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelPlans:
    """Plans, fastest first.

    Fields:
      model, machine: names. devices, global_batch, sequence: what was asked for.
      parameters: of the model.
      plans: at least one. considered, feasible: how many plans divide, and how many of those
        fit and were priced, the others being slower by a lower bound or too large.
    """

    model: str
    machine: str
    devices: int
    global_batch: int
    sequence: int
    parameters: int
    plans: tuple[PricedPlan, ...]
    considered: int
    feasible: int

    @property
    def best(self) -> PricedPlan:
        return self.plans[0]

    def to_dict(self) -> dict[str, Any]:
        """The best plan's numbers, then all plans."""
        about = dataclasses.asdict(dataclasses.replace(self, plans=()))
        about.pop("plans")
        return {**about, **self.best.to_dict(), "plans": [plan.to_dict() for plan in self.plans]}

    def __repr__(self) -> str:
        best = self.best
        return (
            f"ParallelPlans({self.model} on {self.devices} of {self.machine}: {best.step_s:.3g} s, "
            f"MFU {best.mfu:.1%}, {best.memory.peak / GIB:.3g} GiB with {best.plan})"
        )

    def _repr_html_(self) -> str:
        rows = [
            (str(p.plan), f"{p.step_s:#.4g} s", f"{p.mfu:.1%}", f"{p.memory.peak / GIB:#.3g} GiB")
            for p in self.plans
        ]
        return html_table(f"{self.model} on {self.devices} devices of {self.machine}", rows)
