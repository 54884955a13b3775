"""Tables of training plans, and of measured runs beside their prices."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cmjax.parallelism import Comparison, ParallelPlans
from cmjax.parallelism.memory import PARTS
from cmjax.parallelism.result import GIB
from cmjax.report.tables import simple_table


def parallel_table(found: ParallelPlans) -> RenderableType:
    """The plans, fastest first, and what the best one's step and memory are made of."""
    where = f"{found.devices} devices of {found.machine}"
    title = f"{found.model} on {where}, {found.global_batch} sequences a step"
    table = simple_table(title, "plan", "step s", "MFU", "tokens/s/device", "GiB", "bubble")
    for each in found.plans:
        table.add_row(
            str(each.plan).replace(",", ", "),  # so that a line breaks between two names
            f"{each.step_s:#.4g}",
            f"{each.mfu:.1%}",
            f"{each.tokens_per_s_per_device:,.0f}",
            f"{each.memory.peak / GIB:#.3g}",
            f"{each.bubble:.1%}",
        )
    best = found.best
    seconds = best.to_dict()["seconds"]
    parts = ", ".join(f"{part} {getattr(best.memory, part) / GIB:.3g}" for part in PARTS)
    spent = ", ".join(f"{name} {value:.3g}" for name, value in seconds.items() if name != "busy")
    return Group(
        table, Text(f"seconds of the first: {spent}"), Text(f"GiB of its fullest device: {parts}")
    )


def rows_table(found: Comparison) -> RenderableType:
    """Every row's measured and predicted seconds, then the mean and worst error and the ranks."""
    table: Table = simple_table(
        "measured and predicted steps", "plan", "measured s", "predicted s", "error"
    )
    for row in found.rows:
        plan = row.plan
        table.add_row(
            f"line {row.line}: {row.model.layers} x {row.model.hidden}, {plan.devices} devices: "
            f"tensor {plan.tensor}, pipeline {plan.pipeline}, data {plan.data}, "
            f"micro-batch {plan.micro_batch}, {plan.schedule}, {plan.recompute}",
            f"{row.measured_s:#.4g}",
            f"{row.predicted_s:#.4g}",
            f"{row.error:+.1%}",
        )
    tau = found.kendall_tau
    lines = [
        Text(
            f"mean error {found.mean_error:.1%}, worst {found.worst_error:.1%}, Kendall's tau "
            f"{'of no group of plans' if tau is None else f'{tau:.2f}'}",
            style="bold",
        )
    ]
    return Group(table, *lines, *(Text(f"not priced: {reason}") for reason in found.skipped))
