"""PanGu-alpha's training, planned: published splits beside found ones, the topology rule, and what
a step depends on.

    python -m studies.pangu [--out docs]

Writes `tables/pangu_plans.md` (2.6B, 13B and 200B on Ascend 910: time, memory), of the 200B
model `tables/pangu_orders.md` (which dimension lies on which tier, section 4.1), and
`pangu_constants.csv` with its picture: by how much a step changes with every constant of the
machine, by one gradient.

What is PanGu-alpha's (arXiv 2104.12369): sizes, devices, and how the 200B model is split. The
splits of the other two are those of the released code, whose batches are per replica. No step time
was ever published, so these are predictions that nothing holds to account.

`tables/deepseek_training.md` has DeepSeek-V3 beside them, a mixture of experts: as it was trained
(arXiv 2412.19437: 16 stages, experts over 64 GPUs, and 180,000 H800 hours for a trillion tokens,
with 8-bit products; here they are bfloat16), and as found for two machines of the catalog.
"""

import csv
import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cmjax.console import terminal, track
from cmjax.files import replace_text
from cmjax.hardware import Supernode, load_machine
from cmjax.interrupt import leave
from cmjax.models.dense import DenseConfig, preset
from cmjax.options import run_program
from cmjax.parallelism import PricedPlan, elasticities, parallel, parse_plan, price_plan, search
from cmjax.parallelism.links import layout, reach
from cmjax.parallelism.memory import PARTS
from cmjax.parallelism.plan import DIMENSIONS
from cmjax.parallelism.result import GIB
from studies.manual_tables import markdown
from studies.pangu_figure import plot_constants

MACHINE = "ascend910-2048"
TABLES = ("pangu_plans", "pangu_orders", "deepseek_training")
"""What is written to the manual's folder of tables."""
TIERS = ("server", "rack", "spine")
"""The machine's tiers, as its paper names them."""
OF_THE_MACHINE = ("chip", "efficiency", "exchange", "fabric")
"""Groups of constants that are the hardware's; the others are corrections of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A model as it was trained: its preset, chips, sequences of a step, and plan."""

    name: str
    devices: int
    global_batch: int
    published: str

    @property
    def model(self) -> DenseConfig:
        return preset(self.name)


TRAININGS = (
    Training(name="pangu-2.6b", devices=512, global_batch=1024,
             published="data=64,tensor=8,micro_batch=16,optimizer=zero1,overlap=true"),
    Training(name="pangu-13b", devices=1024, global_batch=1024,
             published="data=128,tensor=8,micro_batch=8,optimizer=zero1,overlap=true"),
    Training(name="pangu-200b", devices=2048, global_batch=512,
             published="data=16,tensor=8,pipeline=16,optimizer=zero1,overlap=true"),
)  # fmt: skip


MIXTURE, MIXTURE_BATCH = "deepseek-v3", 15_360
AS_TRAINED = (
    "data=128,pipeline=16,expert=64,recompute=full,optimizer=zero1,overlap=true,"
    "order=tensor-data-pipeline"
)
"""DeepSeek-V3's degrees; 1F1B stands for DualPipe, whose bubble is smaller, and all is recomputed,
which it was not."""
NODES = 256
"""Of its 2,048 H800; the catalog's pod has 48."""
REPORTED_TOKENS_PER_S = 1e12 / (180_000 * 3600)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the study."""

    out: Path = Path("docs")
    """Folder of the tables and the picture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """An order of the dimensions, from neighbours outward.

    Fields:
      tiers: the furthest tier of each.
      waited_s: a step that reduces gradients after its backward passes. overlapped_s: one that
        does so during the last of them. hidden_s: one that never waits for them.
    """

    dimensions: tuple[str, ...]
    tiers: dict[str, str]
    waited_s: float
    overlapped_s: float
    hidden_s: float


def published(training: Training, machine: Supernode) -> PricedPlan:
    """The published plan, priced."""
    plan = parse_plan(training.published)
    return price_plan(training.model, machine, plan, training.global_batch)


def found(training: Training, machine: Supernode) -> PricedPlan:
    """The fastest plan of a search."""
    best = search(training.model, machine, training.devices, training.global_batch, top=1)
    return best.plans[0]


def orders(training: Training, plan: str, machine: Supernode) -> list[Order]:
    """A plan in all orders of its dimensions, the fastest with overlap first."""
    model, batch, parsed, rows = training.model, training.global_batch, parse_plan(plan), []
    degrees = {name: getattr(parsed, name) for name in DIMENSIONS}
    for order in itertools.permutations(DIMENSIONS):
        on = layout(order, degrees, machine)
        waited, overlapped = (
            price_plan(
                model, machine, dataclasses.replace(parsed, order=order, overlap=overlap), batch
            ).time
            for overlap in (False, True)
        )
        rows.append(
            Order(
                dimensions=order,
                tiers={name: TIERS[reach(on[name])] for name in DIMENSIONS},
                waited_s=waited.step_s,
                overlapped_s=overlapped.step_s,
                hidden_s=waited.step_s - waited.reduction,
            )
        )
    return sorted(rows, key=lambda row: row.overlapped_s)


def constants(
    training: Training, plans: dict[str, PricedPlan], machine: Supernode
) -> list[tuple[str, list[float]]]:
    """Per cent of a step's time per per cent of every constant of the hardware, for some plans;
    those that one of them feels most first."""
    slopes = [
        elasticities(training.model, machine, plan.plan, training.global_batch)
        for plan in plans.values()
    ]
    names = {name for each in slopes for name in each if name.split(".")[0] in OF_THE_MACHINE}
    rows = [(name, [each.get(name, 0.0) for each in slopes]) for name in names]
    return sorted(rows, key=lambda row: (-max(map(abs, row[1])), row[0]))


def plans_table(columns: Sequence[tuple[str, PricedPlan]]) -> str:
    """Plans side by side: what they are, then seconds and GiB."""
    plans = [plan for _, plan in columns]
    said = [plan.plan.to_dict() for plan in plans]
    names = [name for name in said[0] if name != "expert"]
    rows = [(name.replace("_", " "), *(_word(each[name]) for each in said)) for name in names]
    rows += [
        ("step, s", *(f"{plan.step_s:.3f}" for plan in plans)),
        ("MFU, %", *(f"{100 * plan.mfu:.1f}" for plan in plans)),
        ("bubble, %", *(f"{100 * plan.bubble:.1f}" for plan in plans)),
        *(
            (f"{part}, GiB", *(f"{getattr(plan.memory, part) / GIB:.2f}" for plan in plans))
            for part in PARTS
        ),
        ("together, GiB", *(f"{plan.memory.peak / GIB:.2f}" for plan in plans)),
    ]
    return markdown(("", *(head for head, _ in columns)), rows)


def orders_table(rows: Sequence[Order]) -> str:
    """Orders of the dimensions, and what each costs."""
    heads = ("order", *DIMENSIONS, "not overlapped, s", "overlapped, s", "all hidden, s")
    return markdown(
        heads,
        (
            (
                "-".join(row.dimensions),
                *(row.tiers[name] for name in DIMENSIONS),
                *(f"{s:.3f}" for s in (row.waited_s, row.overlapped_s, row.hidden_s)),
            )
            for row in rows
        ),
    )


def mixtures() -> list[tuple[str, PricedPlan]]:
    """DeepSeek-V3 as it was trained, and found plans, by what they run on."""
    pod, supernode = load_machine("h800-pod"), load_machine("cloudmatrix384")
    cluster = dataclasses.replace(pod, nodes=NODES)
    options: dict[str, Any] = {"global_batch": MIXTURE_BATCH, "top": 1}
    trained = parallel(MIXTURE, cluster, plan=AS_TRAINED, **options)
    columns = [(f"{cluster.ranks:,} H800, as trained", trained.best)]
    for machine, devices in ((pod, "GPUs"), (supernode, "dies")):
        best = parallel(MIXTURE, machine, **options).best
        columns.append((f"`{machine.name}`, {machine.ranks} {devices}, found", best))
    return columns


def mixtures_table(columns: Sequence[tuple[str, PricedPlan]]) -> str:
    """Plans by machine, a row each."""
    heads = ("on", "data", "pipeline", "expert", "recompute", "optimizer", "step, s",
             "tokens/s per device", "MFU, %", "GiB")  # fmt: skip
    return markdown(
        heads,
        (
            (
                name, str(each.plan.data), str(each.plan.pipeline), str(each.plan.expert),
                str(each.plan.recompute), each.plan.optimizer, f"{each.step_s:.2f}",
                f"{each.tokens_per_s_per_device:.0f}", f"{100 * each.mfu:.1f}",
                f"{each.memory.peak / GIB:.1f}",
            )
            for name, each in columns
        ),
    )  # fmt: skip


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def main(options: Options, console: Console) -> None:
    """Search, price, and write tables and picture."""
    of_plans, of_orders, of_mixtures = (options.out / f"tables/{name}.md" for name in TABLES)
    of_plans.parent.mkdir(parents=True, exist_ok=True)
    machine, columns = load_machine(MACHINE), []
    for training in track(TRAININGS, "searching"):
        columns += [
            (f"{training.name}, published", published(training, machine)),
            (f"{training.name}, found", found(training, machine)),
        ]
    replace_text(of_plans, plans_table(columns))
    largest = TRAININGS[-1]
    rows = orders(largest, largest.published, machine)
    replace_text(of_orders, orders_table(rows))
    plans = {"published": columns[-2][1], "found": columns[-1][1]}
    table = constants(largest, plans, machine)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["constant", *plans])
    writer.writerows([name, *(f"{value:.6f}" for value in values)] for name, values in table)
    replace_text(options.out / "pangu_constants.csv", text.getvalue())
    plot_constants(options.out / "pangu_constants.csv", options.out / "pangu_constants.png")
    replace_text(of_mixtures, mixtures_table(mixtures()))
    console.print(f"written: tables and picture in {options.out}", highlight=False)


if __name__ == "__main__":
    leave(run_program(lambda options: main(options, terminal()), Options, __doc__))
