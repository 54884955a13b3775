"""The picture of `studies.placement`: what a plan gains on loads it was not made for.

    python -m studies.placement_figure [--csv docs/placement.csv] [--out docs/placement.png]

Reads the rows that `python -m studies.placement --full` writes. Each line is a recording that plans
are judged on; each point is a plan's time against greedy, planned on the same data.
"""

import csv
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.report.plots.figure import (
    BLUE,
    FAINT,
    GREY,
    INK,
    ORANGE,
    PALE,
    add_axes,
    new_figure,
    save,
    set_title,
)

RANKS = 128
"""Where there is something to gain, and every recording has a row."""
SHOWN = {"search": (BLUE, "o"), "search, shrunk 0.2": (ORANGE, "D"), "ceiling": (GREY, "|")}
"""What is drawn, in this order, on every line."""
NAMES = {
    "ESFT law": ("ESFT law", "ESFT law → intent"),
    "ESFT intent": ("ESFT intent", "ESFT intent → summary"),
    "ESFT summary": ("ESFT summary", "ESFT summary → law"),
    "ESFT intent + summary, other law": ("", "ESFT intent, summary → law"),
    "OLMoE 3 domains, other github": ("", "OLMoE, 3 domains → github"),
    "gpt-oss 15 of 57 subjects, other the rest": ("", "gpt-oss, 15 subjects → 42"),
    "gpt-oss tokens": ("gpt-oss decode", ""),
    "Mixtral 6 subjects, other the 7th": ("", "Mixtral, 6 subjects → 7th"),
}
"""Case of the study -> its name where later windows are judged, and where another domain is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """Options of the picture."""

    csv: Path = Path("docs/placement.csv")
    """Rows of `studies.placement --full`."""
    out: Path = Path("docs/placement.png")
    """The picture, .png or .svg."""
    ranks: int = RANKS
    """Of the rows that are shown."""


@dataclasses.dataclass(frozen=True)
class Line:
    """Plans judged on one recording: percent of time against greedy, by method."""

    name: str
    change: Mapping[str, float]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of the study.

    Raises: ValueError: a file without the columns that are drawn.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = {"case", "ranks", "redundant", "method", "later_ms", "other_ms"}
    missing = wanted - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}")
    return rows


def lines(rows: Iterable[Mapping[str, str]], ranks: int) -> tuple[list[Line], list[Line]]:
    """Of later windows, and of other domains: one line per recording, most redundancy first."""
    later, other = [], []
    cases: dict[str, dict[str, Mapping[str, str]]] = {}
    slots: dict[str, int] = {}
    for row in rows:
        case = row["case"]
        if int(row["ranks"]) != ranks or case not in NAMES:
            continue
        redundant = int(row["redundant"])
        if redundant > slots.get(case, -1):
            slots[case], cases[case] = redundant, {}
        if redundant == slots[case]:
            cases[case][row["method"]] = row
    for case, names in NAMES.items():
        methods = cases.get(case, {})
        for where, name, found in zip(("later", "other"), names, (later, other), strict=True):
            if name and methods.get("greedy", {}).get(f"{where}_ms"):
                found.append(Line(name, _changes(methods, where)))
    return later, other


def _changes(methods: Mapping[str, Mapping[str, str]], where: str) -> dict[str, float]:
    """Percent of greedy's time; the ceiling is the bound of plans made for these very loads."""
    greedy = float(methods["greedy"][f"{where}_ms"])
    bound = greedy / (1 + float(methods["greedy"][f"{where}_gap"]))
    times = {name: float(row[f"{where}_ms"]) for name, row in methods.items() if name in SHOWN}
    return {name: 100 * (ms / greedy - 1) for name, ms in (times | {"ceiling": bound}).items()}


def plot(rows: Iterable[Mapping[str, str]], path: Path, *, ranks: int = RANKS) -> None:
    """Draw both panels.

    Args:
      rows: of `read_rows`. path: .png or .svg. ranks: of the rows that are shown.
    Raises: ValueError: no row of so many ranks, or another suffix.
    """
    later, other = lines(rows, ranks)
    if not (later and other):
        raise ValueError(f"no rows of {ranks} ranks to draw")
    row_inches, between, bottom = 0.30, 0.42, 0.62
    figure = new_figure(0.95 + between + bottom + row_inches * (len(later) + len(other)))
    lowest = min(value for line in later + other for value in line.change.values())
    lower_panel = row_inches * len(later)
    panels = (
        (other, bottom + lower_panel + between, "judged on another domain"),
        (later, bottom, "judged on later windows"),
    )
    for panel, start, name in panels:
        height = row_inches * len(panel)
        top = figure.get_figheight() - start - height
        axes = add_axes(figure, left=2.35, right=0.25, bottom=start, top=top)
        axes.set_xlim(lowest - 4, 8)
        _draw(axes, panel)
        place = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
        axes.text(-0.01, 1, name, size=9.5, color=FAINT, style="italic", **place)
    _name_marks(figure.axes[0], other[0])
    figure.axes[0].set_xticklabels([])
    figure.axes[1].set_xlabel("time against greedy planned on the same data, %   (left is faster)")
    set_title(
        figure,
        finding(other),
        f"MoE layers on {ranks} ranks, a slot a rank more than needed; planned on → judged on",
    )
    save(figure, path)


def finding(other: list[Line]) -> str:
    """What the picture shows, in a sentence."""
    gains = {
        name: sorted(-line.change[name] for line in other if line.change[name] < -5)
        for name in ("search", "search, shrunk 0.2")
    }
    shrunk = gains["search, shrunk 0.2"]
    span = f"{shrunk[0]:.0f} to {shrunk[-1]:.0f} %" if shrunk else "nothing"
    return (
        f"On an unseen domain, planning for loads shrunk by 0.2 gains {span} in {len(shrunk)} of "
        f"{len(other)} cases, plain search in {len(gains['search'])}"
    )


def _draw(axes, panel: list[Line]) -> None:
    heights = np.arange(len(panel))[::-1]
    axes.axvline(0, color=INK, linewidth=0.8)
    for height, line in zip(heights, panel, strict=True):
        axes.plot([line.change["ceiling"], 0], [height, height], color=PALE, linewidth=6, zorder=0)
        for name, (colour, marker) in SHOWN.items():
            style = {"markersize": 14, "markeredgewidth": 2} if marker == "|" else {"markersize": 7}
            axes.plot(line.change[name], height, marker, color=colour, **style)
    axes.set_yticks(heights, [line.name for line in panel])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(-0.6, len(panel) - 0.4)


def _name_marks(axes, line: Line) -> None:
    """Write over the marks of the uppermost line what they are."""
    words = {"search": "search", "search, shrunk 0.2": "shrunk by 0.2", "ceiling": "most possible"}
    top = axes.get_ylim()[1]
    for name, (colour, _) in SHOWN.items():
        axes.annotate(
            words[name],
            (line.change[name], top),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=FAINT if colour == GREY else colour,
            weight="bold",
        )


def main(options: Figure) -> None:
    plot(read_rows(options.csv), options.out, ranks=options.ranks)
    print(f"written: {options.out}")


if __name__ == "__main__":
    leave(run_program(main, Figure, __doc__))
