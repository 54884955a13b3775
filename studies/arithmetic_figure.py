"""The picture of `studies.arithmetic`: what an arithmetic loses, against the time it takes.

    python -m studies.arithmetic_figure [--csv docs/arithmetic.csv] [--out docs/arithmetic.png]

draws it again from a table of the study's rows, without training anything.
"""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.transforms import Bbox

from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.report.plots.figure import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    add_axes,
    new_figure,
    save,
    set_title,
)
from cmjax.report.units import percent

_CLOSE = 4  # of the places for a name, those that touch its point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """Options of the picture."""

    csv: Path = Path("docs/arithmetic.csv")
    """One row per arithmetic, with the columns of the study's results."""
    out: Path = Path("docs/arithmetic.png")
    """The picture, .png or .svg."""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Divergence against predicted time, a panel per phase, every point with its name."""
    figure = new_figure(3.9)
    rows = [row for row in rows if "decode_ms" in row]
    panels = (("decode", BLUE, 0.8, 4.0), ("prefill", ORANGE, 4.55, 0.25))
    for phase, colour, left, right in panels:
        axes = add_axes(figure, left=left, right=right, top=0.85)
        times = [row[f"{phase}_ms"] for row in rows]
        points = [
            (time, max(row["divergence"], 1e-9)) for time, row in zip(times, rows, strict=True)
        ]
        axes.set_yscale("log")
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=7)
        axes.margins(0.2)
        axes.autoscale_view()  # now, for names are placed in pixels
        _name_points(axes, points, [row["name"] for row in rows])
        axes.set_xlabel(f"predicted {phase} step of DeepSeek-R1, ms")
        if phase == "decode":
            axes.set_ylabel("KL from float32, nats per byte")
    how = "Left and low is better; divergence of a small model. w4a16 assumes 4-bit matrix units."
    set_title(figure, finding(rows), how)
    save(figure, path)


def finding(rows: list[dict[str, Any]]) -> str:
    """How fast the fastest arithmetic that the chip has units for decodes, and how right it is."""
    there = [row for row in rows if "w4a16" not in row["name"]]
    best = min(there, key=lambda row: (row["decode_ms"], row["divergence"]))
    ratio = rows[0]["decode_ms"] / best["decode_ms"]
    return (
        f"{best['name']}: decodes {ratio:.2f} times as fast as bfloat16, agrees on "
        f"{percent(best['agreement'])} of bytes"
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as the study has them; what is empty is left out.

    Raises: ValueError: a cell that holds no number.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [
            {"name": row.pop("name")} | {key: float(cell) for key, cell in row.items() if cell}
            for row in rows
        ]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _name_points(axes, points: list[tuple[float, float]], names: list[str]) -> None:
    """Write beside each group of points what they are, where nothing else is; a line leads there
    from further away."""
    pixels = axes.transData.transform(points)
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    frame, to_data = axes.get_window_extent(), axes.transData.inverted().transform
    for group in _together(pixels):
        group.sort(key=lambda number: -pixels[number][1])
        box = Bbox.union([taken[number] for number in group])
        label = "\n".join(names[number] for number in group)
        others = [b for number, b in enumerate(taken) if number not in group]
        for place, (x, y, across, along) in enumerate(_around(box)):
            there = to_data((x, y))
            text = axes.text(*there, label, ha=across, va=along, fontsize=9, color=INK)
            extent = text.get_window_extent()
            inside = frame.x0 <= extent.x0 and extent.x1 <= frame.x1 + 20 and frame.y0 <= extent.y0
            if inside and not any(extent.overlaps(b) for b in others):
                taken.append(extent)
                if place >= _CLOSE:
                    middle = to_data((box.x0 + box.width / 2, box.y0 + box.height / 2))
                    axes.plot(*zip(middle, there, strict=True), color=FAINT, lw=0.6, zorder=0)
                break
            text.remove()


def _around(box: Bbox, line: float = 14.0) -> Iterator[tuple[float, float, str, str]]:
    """Places for a text, x, y and what of it lies there: beside the box, over and under it, and
    the same a line further away each time."""
    x, y = box.x0 + box.width / 2, box.y0 + box.height / 2
    for away in line * np.arange(12):
        yield box.x1 + 3, y + away, "left", "center"
        yield box.x0 - 3, y - away, "right", "center"
        yield x, box.y1 + 2 + away, "center", "bottom"
        yield x, box.y0 - 2 - away, "center", "top"
        yield box.x1 + 3, y - away, "left", "center"
        yield box.x0 - 3, y + away, "right", "center"


def _together(pixels, reach: float = 14.0) -> list[list[int]]:
    """Numbers of the points, those nearer than `reach` pixels to one another in one group."""
    groups: list[list[int]] = []
    for number, pixel in enumerate(pixels):
        near = [g for g in groups if min(np.hypot(*(pixels[g] - pixel).T)) < reach]
        if near:
            near[0].append(number)
        else:
            groups.append([number])
    return groups


def main(options: Figure) -> None:
    plot(read_rows(options.csv), options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    leave(run_program(main, Figure, __doc__))
