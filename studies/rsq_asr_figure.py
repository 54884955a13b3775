"""The picture of `studies.rsq_asr`: accuracy against speed, a panel per network."""

from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cmjax.report.plots.figure import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    add_axes,
    new_figure,
    save,
    set_title,
)

_MARKS = {
    "float32": (GREY, "s"),
    "int8 direct, PTQ": (BLUE, "o"),
    "Winograd naive, PTQ": (VERMILION, "X"),
    "Winograd one range, PTQ": (ORANGE, "s"),
    "Winograd per tap, PTQ": (ORANGE, "D"),
    "QAT, naive ranges": (PURPLE, "X"),
    "QAT, safe ranges": (PURPLE, "v"),
    "RSQ, one range": (GREEN, "P"),
    "RSQ, no distillation": (SKY, "P"),
    "RSQ": (GREEN, "*"),
}


def plot_tradeoff(found: dict[str, list[dict[str, Any]]], path: Path, *, published: float) -> None:
    """Word error rate of the last test set against end-to-end speed over int8 direct.

    Args:
      found: rows of `studies.rsq_asr.rows` by network.
      path: .png or .svg.
      published: speed to draw a line at.
    Raises: ValueError for another suffix.
    """
    figure = new_figure(3.8)
    panel = (8.0 - 2.2) / len(found)  # the rest is the margin for names
    shown = [100 * value for rows in found.values() for row in rows for value in _range(row)]
    fastest = max([row["end_to_end"] for rows in found.values() for row in rows] + [published])
    for number, (network, rows) in enumerate(found.items()):
        left = 0.7 + number * panel
        axes = add_axes(figure, left=left, right=8.0 - left - panel + 0.45, top=0.9)
        axes.axvline(published, color=FAINT, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"published: {published}x",
            (published, 0.5),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            rotation=90,
            fontsize=8,
            color=FAINT,
        )
        for row in rows:
            colour, marker = _MARKS[row["variant"]]
            low, wer, high = (100 * value for value in _range(row))
            axes.errorbar(
                row["end_to_end"],
                wer,
                yerr=[[wer - low], [high - wer]],
                color=colour,
                marker=marker,
                markersize=10 if marker == "*" else 7,
                markeredgecolor="white",
                markeredgewidth=0.6,
                capsize=3,
                linestyle="none",
                label=row["variant"],
            )
        axes.set_yscale("log")
        axes.set_ylim(0.7 * max(min(shown), 0.01), 1.4 * max(shown))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(0, 1.1 * fastest)
        axes.set_xlabel("speed end to end over int8 direct")
        axes.set_ylabel("word error rate, %" if number == 0 else "")
        axes.set_title(network, fontsize=10, color=FAINT, loc="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=8.5)
    set_title(figure, tradeoff_title(found), "bars: largest and smallest of the seeds")
    save(figure, path)


def tradeoff_title(found: dict[str, list[dict[str, Any]]]) -> str:
    """The finding: what RSQ gains in speed and loses in accuracy, where that is fastest."""
    gains = []
    for network, rows in found.items():
        by_name = {row["variant"]: row for row in rows}
        ours, naive = by_name["RSQ"], by_name["Winograd naive, PTQ"]
        test = list(ours["wer"])[-1]
        losses = [100 * row["wer_loss"][test] for row in (ours, naive)]
        gains.append((ours["end_to_end"], *losses, network))
    speed, loss, without, network = max(gains)
    gain = f"{network} with RSQ: {speed:.2f}x int8 direct"
    return f"{gain}, word errors {loss:+.2f} points from float32 (naive {without:+.1f})"


def _range(row: dict[str, Any]) -> tuple[float, float, float]:
    """Least, mean and largest word error rate of the last test set over the seeds."""
    test = list(row["wer"])[-1]
    return row["wer_least"][test], row["wer"][test], row["wer_most"][test]
