"""Training plans side by side: what a step's seconds go to, and a device's memory."""

from pathlib import Path

from matplotlib.figure import Figure

from cmjax.parallelism import ParallelPlans
from cmjax.parallelism.memory import PARTS
from cmjax.parallelism.result import GIB
from cmjax.report.figure_path import checked_path
from cmjax.report.plots import figure as fig

_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7")  # Okabe and Ito
_SPENT = ("busy", "idle", "reduction", "optimizer", "tied")


def plot_plans(found: ParallelPlans, path: str | Path) -> None:
    """Draw a search's plans to `path` (.png or .svg): stacked seconds, and stacked GiB."""
    path = checked_path(path)
    count = len(found.plans)
    figure = Figure(figsize=(fig.WIDTH_INCHES, 1.9 + 0.42 * count))
    time, memory = figure.subplots(1, 2, sharey=True)
    labels = []
    for row, each in enumerate(found.plans):
        p, spent = each.plan, each.to_dict()["seconds"]
        chunks = f" v{p.interleave}" if p.interleave > 1 else ""
        labels.append(
            f"D{p.data} T{p.tensor} P{p.pipeline}{chunks} b{p.micro_batch}\n"
            f"{p.schedule}, {p.recompute}, {p.optimizer}"
        )
        parts = {**spent, "idle": max(0.0, spent["pipeline"] - spent["busy"])}
        _stack(time, row, [parts[name] for name in _SPENT])
        _stack(memory, row, [getattr(each.memory, part) / GIB for part in PARTS])
    time.set_yticks(range(count), labels, size=8)
    time.invert_yaxis()
    for axes, names, unit in ((time, _SPENT, "seconds of a step"), (memory, PARTS, "GiB a device")):
        fig.quiet_axes(axes)
        axes.set_xlabel(unit)
        for colour, name in zip(_COLOURS, names, strict=True):
            axes.barh([0], [0], color=colour, label=name)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, fontsize=8,
            handlelength=1.0, columnspacing=0.9,
        )  # fmt: skip
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.24, right=0.97, top=1 - 1.15 / height, bottom=0.55 / height, wspace=0.08
    )
    fig.set_title(figure, plans_title(found), "D data, T tensor, P pipeline, b micro-batch")
    fig.save(figure, path)


def plans_title(found: ParallelPlans) -> str:
    """The finding: the fastest plan's step and use of the chips."""
    best = found.best
    return (
        f"{found.model} on {found.devices} devices: {best.step_s:.2f} s a step, "
        f"{best.mfu:.0%} of the peak"
    )


def _stack(axes, row: int, amounts: list[float]) -> None:
    left = 0.0
    for amount, colour in zip(amounts, _COLOURS, strict=True):
        axes.barh(row, amount, left=left, color=colour, height=0.62)
        left += amount
