"""The picture of `studies.rsq_asr`: accuracy against speed, a panel per network."""

from pathlib import Path
from typing import Any

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
    "Winograd per tap, PTQ": (ORANGE, "D"),
    "QAT, safe ranges": (PURPLE, "v"),
    "RSQ, no distillation": (SKY, "P"),
    "RSQ": (GREEN, "*"),
}


def plot_tradeoff(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Word error rate of joined strings against end-to-end speed over int8 direct.

    Args:
      found: rows of `studies.rsq_asr.rows` by network.
      path: .png or .svg.
    Raises: ValueError for another suffix.
    """
    height = 3.6
    figure = new_figure(height)
    count = len(found)
    panel = (8.0 - 2.2) / count  # the rest is the margin for names
    for number, (network, rows) in enumerate(found.items()):
        left = 0.6 + number * panel
        axes = add_axes(figure, left=left, right=8.0 - left - panel + 0.55)
        worst = []
        for row in rows:
            colour, marker = _MARKS[row["variant"]]
            test = list(row["wer"])[-1]
            wer, spread = 100 * row["wer"][test], 100 * row["wer_spread"][test]
            worst.append(wer + spread / 2)
            axes.errorbar(
                row["end_to_end"],
                wer,
                yerr=spread / 2,
                color=colour,
                marker=marker,
                markersize=10 if marker == "*" else 7,
                capsize=3,
                linestyle="none",
                label=row["variant"],
            )
        axes.set_ylim(0, 1.15 * max(worst) + 0.1)
        axes.set_xlim(0, 1.15 * max(row["end_to_end"] for row in rows))
        axes.set_xlabel("speed end to end over int8 direct")
        axes.set_ylabel("word error rate, %" if number == 0 else "")
        axes.set_title(network, fontsize=10, color=FAINT, loc="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=8.5)
    set_title(figure, tradeoff_title(found), "bars: largest and smallest of the seeds")
    save(figure, path)


def tradeoff_title(found: dict[str, list[dict[str, Any]]]) -> str:
    """The finding: what RSQ gains in speed and loses in accuracy, where that is best."""
    gains = []
    for network, rows in found.items():
        by_name = {row["variant"]: row for row in rows}
        ours, exact = by_name["RSQ"], by_name["float32"]
        test = list(ours["wer"])[-1]
        gains.append((ours["end_to_end"], 100 * (ours["wer"][test] - exact["wer"][test]), network))
    speed, loss, network = max(gains)
    gain = f"RSQ on {network}: {speed:.2f}x int8 direct"
    return f"{gain}, word error rate {loss:+.2f} points from float32"
