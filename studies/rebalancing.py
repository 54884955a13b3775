"""Does rebalancing pay?  A service that never moves, always moves, or moves when it pays.

    python -m studies.rebalancing [--ranks 32] [--redundant 32]

Recorded workloads follow each other, each in equal intervals; an interval lasts so many decode
steps. Every policy is charged what happens: the priced MoE time of each interval under the plan in
force, chosen from earlier intervals only, and every migration's standstill and weight transfer. The
standstill is what users of SGLang measured: 1 s and 20 ms a layer (sgl-project/sglang, issue 7879).
"""

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from cmjax import placement
from cmjax.console import terminal
from cmjax.deploy.layer_price import LayerPrice
from cmjax.hardware import Supernode, load_machine
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.placement import Loads, MigrationCost, Plan, Problem, Rebalancer

DATA = Path(os.environ.get("CMJAX_DATA", Path(__file__).parents[1] / "../shared/data"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    loads: str = ""
    """Family of workloads with token-level routes (default: the three domains of ESFT, or a
    built-in drifting load where that is absent)."""
    windows: int = 8
    """Intervals per workload."""
    ranks: int = 32
    redundant: int = 32
    tokens: int = 96
    """Tokens a rank routes per step."""
    steps: tuple[int, ...] = (100, 1_000, 10_000, 100_000, 1_000_000)
    """Steps an interval lasts, one row each."""
    on: str = "cloudmatrix384"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A policy's service: seconds of all steps and of all migrations, and how many there were."""

    steps_s: float
    moving_s: float
    migrations: int

    @property
    def total_s(self) -> float:
        return self.steps_s + self.moving_s


class Service:
    """The intervals, the price and the machine that all policies share."""

    def __init__(self, study: Study):
        self.machine: Supernode = load_machine(study.on)
        intervals = _intervals(study)
        self.price = LayerPrice(
            "deepseek-r1", self.machine,
            ranks=study.ranks, experts=intervals[0].experts, redundant=study.redundant,
            tokens=study.tokens,
        )  # fmt: skip
        self.intervals = [self.price.scale(loads) for loads in intervals]
        self.cost = MigrationCost(expert_bytes=self.price.expert_bytes)
        self.ranks, self.redundant = study.ranks, study.redundant
        self.first = self.planned(self.intervals[0])

    def planned(self, loads: Loads) -> Plan:
        return placement.greedy(Problem(loads, self.ranks, self.redundant))

    def step_s(self, plan: Plan, loads: Loads) -> float:
        return placement.evaluate(plan, loads, self.price).mean_time_s

    def never(self, steps: int) -> Outcome:
        served = self.intervals[1:]
        return Outcome(steps * sum(self.step_s(self.first, loads) for loads in served), 0.0, 0)

    def always(self, steps: int) -> Outcome:
        """Plans anew from each interval for the next."""
        plan, steps_s, moving_s, migrations = self.first, 0.0, 0.0, 0
        for past, loads in itertools.pairwise(self.intervals):
            new = placement.match(plan, self.planned(past))
            moved = placement.transfers(
                plan, new, self.machine, expert_bytes=self.cost.expert_bytes
            )
            if moved:
                layers = len({sent.layer for sent in moved})
                wire = placement.wire_s(moved, plan, self.machine).sum()
                moving_s += self.cost.stall_s + layers * self.cost.layer_stall_s + float(wire)
                migrations += 1
            plan = new
            steps_s += steps * self.step_s(plan, loads)
        return Outcome(steps_s, moving_s, migrations)

    def when_it_pays(self, steps: int) -> Outcome:
        online = Rebalancer(
            self.first, self.price, self.machine, cost=self.cost,
            assignments_per_step=self.price.assignments, horizon_steps=steps,
        )  # fmt: skip
        online.propose(self.intervals[0].counts[0])
        steps_s, moving_s, migrations = 0.0, 0.0, 0
        for loads in self.intervals[1:]:
            steps_s += steps * self.step_s(online.plan, loads)
            proposal = online.propose(loads.counts[0])
            if proposal.pays:
                online.adopt(proposal)
                moving_s += proposal.cost_s
                migrations += 1
        return Outcome(steps_s, moving_s, migrations)


def _intervals(study: Study) -> list[Loads]:
    recorded = study.loads or str(DATA / "moe_esft_deepseek_v2_lite")
    if study.loads or Path(recorded).is_dir():
        family = placement.read_family(recorded, windows=study.windows).values()
        return [Loads(window, loads.source) for loads in family for window in loads.counts]
    drifting = placement.example_loads(windows=3 * study.windows, layers=26, experts=64)
    return [Loads(window, drifting.source) for window in np.asarray(drifting.counts)]


def main(study: Study) -> None:
    service = Service(study)
    policies = {
        "never": service.never,
        "always": service.always,
        "when it pays": service.when_it_pays,
    }
    title = f"{len(service.intervals)} intervals; steps are per interval"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("steps", *policies, "best"):
        table.add_column(name, justify="right", no_wrap=True)
    for steps in study.steps:
        found = {name: policy(steps) for name, policy in policies.items()}
        base = found["never"].total_s
        cells = [
            f"{100 * outcome.total_s / base:.1f} % ({outcome.migrations})"
            for outcome in found.values()
        ]
        best = min(found, key=lambda name: found[name].total_s)
        table.add_row(f"{steps:,}", *cells, best)
    table.caption = "service time over that of never moving (migrations)"
    terminal().print(table)


if __name__ == "__main__":
    leave(run_program(main, Study, __doc__))
