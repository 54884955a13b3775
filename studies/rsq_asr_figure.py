"""The picture of `studies.rsq_asr`: word error rate and speed of every way to int8.

    python -m studies.rsq_asr_figure [--csv docs/rsq_asr.csv] [--out docs/rsq_asr.png]

draws it again from a table of the study's rows, without training anything.
"""

import csv
import dataclasses
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.report.plots.figure import (
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    VERMILION,
    add_axes,
    new_figure,
    save,
    set_title,
)

_GROUPS = {
    "not Winograd": (
        GREY,
        {"float32": "float32", "int8 direct, PTQ": "int8 direct, calibrated only"},
    ),
    "Winograd, no range scaling": (
        VERMILION,
        {
            "Winograd naive, PTQ": "calibrated only, one step",
            "QAT, naive ranges": "trained, one step",
            "QAT, safe ranges": "trained, safe range",
        },
    ),
    "Winograd, one range scaled": (
        ORANGE,
        {"Winograd one range, PTQ": "calibrated only", "RSQ, one range": "trained (RSQ)"},
    ),
    "Winograd, a range per point": (
        GREEN,
        {
            "Winograd per tap, PTQ": "calibrated only",
            "RSQ, no distillation": "trained, not distilled",
            "RSQ": "trained (RSQ)",
        },
    ),
}
"""What the ways have in common -> their colour, and what each is called under that heading."""

PUBLISHED = 1.48
"""Speed over int8 direct of Wav2letter on ARMv7, end to end: Yao et al., arXiv:2010.14841."""

_NETWORKS = {"dfsmn": "ConvDFSMN, 3 taps, F(6,3)", "wav2letter": "Wav2letter, 7 taps, N88"}
_LINE_INCHES = 0.24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """Options of the picture."""

    csv: Path = Path("docs/rsq_asr.csv")
    """One row per network and way: word error rates in %, speeds over int8 direct."""
    out: Path = Path("docs/rsq_asr.png")
    """The picture, .png or .svg."""


def plot_tradeoff(found: dict[str, list[dict[str, Any]]], path: Path, *, published: float) -> None:
    """Word error rate of the last test set by way to int8, a panel per network, speeds beside it.

    Args:
      found: rows of `studies.rsq_asr.rows` by network.
      path: .png or .svg.
      published: the speed that the paper of RSQ reports, for the caption.
    Raises: ValueError for another suffix.
    """
    lines = _lines()
    height = _LINE_INCHES * len(lines)
    figure = new_figure(height + 1.75)
    left, right, between = 2.35, 0.55, 0.75
    panel = (8.0 - left - right - between * (len(found) - 1)) / len(found)
    shown = [100 * value for rows in found.values() for row in rows for value in _range(row)]
    for number, (network, rows) in enumerate(found.items()):
        start = left + number * (panel + between)
        axes = add_axes(figure, left=start, right=8.0 - start - panel, bottom=0.6, top=1.15)
        axes.set_xscale("log")
        axes.set_xlim(0.7 * max(min(shown), 0.01), 1.3 * max(shown))
        axes.set_ylim(len(lines) - 0.5, -0.5)
        _draw(axes, lines, {row["variant"]: row for row in rows})
        axes.set_xlabel("word error rate, %")
        axes.text(0, 1.01, _NETWORKS.get(network, network), size=10, weight="bold", color=FAINT,
                  transform=axes.transAxes, va="bottom")  # fmt: skip
        if number == 0:
            _name_lines(axes, lines)
    caption = (
        "Dots: means, bars: least and largest of the seeds; dotted: float32. "
        f"Right: speed over int8 direct (published: {published}x)."
    )
    set_title(figure, tradeoff_title(found), caption)
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


def read_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows as `studies.rsq_asr.rows` makes them, by network, from a table in %.

    Raises: ValueError: a column that is missing or holds no number.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                shares = {name: float(row[name]) / 100 for name in _SHARES}
                speed = float(row["end_to_end"])
                network, variant = row["network"], row["variant"]
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{path}: {error} in {row}") from None
            found.setdefault(network, []).append(
                {"variant": variant, "end_to_end": speed}
                | {name: {"test": share} for name, share in shares.items()}
            )
    return found


_SHARES = ("wer", "wer_least", "wer_most", "wer_loss")


def _lines() -> list[tuple[str | None, str, str]]:
    """(variant, or None for a heading; words; colour), from top to bottom."""
    lines = []
    for heading, (colour, ways) in _GROUPS.items():
        lines.append((None, heading, colour))
        lines += [(variant, words, colour) for variant, words in ways.items()]
    return lines


def _draw(axes, lines, by_name: dict[str, dict[str, Any]]) -> None:
    """Dots, bars and speeds of one network."""
    if "float32" in by_name:
        base = 100 * _range(by_name["float32"])[1]
        axes.axvline(base, color=GREY, linewidth=1, linestyle=":", zorder=0)
    for height, (variant, _, colour) in enumerate(lines):
        if variant is None or variant not in by_name:
            continue
        row = by_name[variant]
        low, wer, high = (100 * value for value in _range(row))
        axes.axhline(height, color=PALE, linewidth=0.8, zorder=0)
        axes.plot([low, high], [height, height], color=colour, linewidth=3, alpha=0.5)
        axes.plot(wer, height, "o", color=colour, markersize=7)
        axes.annotate(
            f"{row['end_to_end']:.2f}x",
            (1.02, height),
            xycoords=("axes fraction", "data"),
            va="center",
            size=9,
            color=INK,
        )
    axes.xaxis.set_major_locator(LogLocator(subs=(1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _name_lines(axes, lines) -> None:
    for height, (variant, words, colour) in enumerate(lines):
        heading = variant is None
        strong = {"weight": "bold", "color": FAINT if colour == GREY else colour}
        axes.annotate(
            words,
            (-0.02, height),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            size=9,
            **(strong if heading else {"color": INK}),
        )


def _range(row: dict[str, Any]) -> tuple[float, float, float]:
    """Least, mean and largest word error rate of the last test set over the seeds."""
    test = list(row["wer"])[-1]
    return row["wer_least"][test], row["wer"][test], row["wer_most"][test]


def main(options: Figure) -> None:
    plot_tradeoff(read_rows(options.csv), options.out, published=PUBLISHED)
    print(f"written: {options.out}")


if __name__ == "__main__":
    leave(run_program(main, Figure, __doc__))
