"""The picture of `studies.pangu`: what a training step of the 200B model hangs on.

    python -m studies.pangu_figure [--csv docs/pangu_constants.csv] [--out docs/pangu_constants.png]

draws it again from the study's table, without searching anything.
"""

import csv
import dataclasses
import re
from pathlib import Path

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
    widest_inches,
)

COLOURS = (ORANGE, BLUE)
WEAKEST = 0.002
"""Of the step, per cent per cent: constants that no plan feels more are left out."""
WORDS = {
    "chip.cube_flops_16bit": "matrix units, FLOP/s",
    "chip.hbm_bytes_per_s": "HBM, bytes/s",
    "chip.vector_bytes_per_s": "vector units, bytes/s",
    "chip.matrix_startup_s": "start of a matrix kernel, s",
    "chip.attention_startup_s": "start of attention, s",
    "chip.vector_startup_s": "start of a vector kernel, s",
    "chip.collective_startup_s": "start of a collective, s",
    "efficiency.gemm": "share of FLOP/s that products reach",
    "efficiency.attention": "share that attention reaches",
    "efficiency.hbm": "share of HBM that kernels reach",
    "exchange.bandwidth": "share of links that L2-sized messages reach",
    "exchange.bandwidth_from_hbm": "share of links that larger messages reach",
    "exchange.jitter_s": "jitter between ranks, s",
    "fabric.die.bandwidth_bytes_per_s": "links in a server, bytes/s",
    "fabric.node.bandwidth_bytes_per_s": "links in a rack, bytes/s",
    "fabric.supernode.bandwidth_bytes_per_s": "links between racks, bytes/s",
    "fabric.die.latency_s": "latency in a server, s",
    "fabric.node.latency_s": "latency in a rack, s",
    "fabric.supernode.latency_s": "latency between racks, s",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """Options of the picture."""

    csv: Path = Path("docs/pangu_constants.csv")
    """A row per constant: its name, then per cent of the step per per cent of it, by plan."""
    out: Path = Path("docs/pangu_constants.png")
    """The picture, .png or .svg."""


def read_rows(path: Path) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Names of the plans, and a row per constant.

    Raises: ValueError: other columns, or a cell that holds no number.
    """
    with path.open(newline="") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    try:
        if head[:1] != ["constant"] or len(head) < 2 or not rows:
            raise ValueError("expected the columns constant and one of a plan, and rows")
        return head[1:], [
            (name, [float(cell) for _, cell in zip(head[1:], cells, strict=True)])
            for name, *cells in rows
        ]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def plot_constants(table: Path, path: Path) -> None:
    """A group of bars per constant, one bar per plan; the longest first."""
    plans, rows = read_rows(table)
    rows = [row for row in rows if max(map(abs, row[1])) >= WEAKEST]
    labels = [WORDS.get(name, name) for name, _ in rows]
    figure = new_figure(1.5 + 0.36 * len(rows))
    axes = add_axes(figure, left=0.3 + widest_inches(figure, labels, 9), right=0.75)
    height = 0.8 / len(plans)
    for number, (plan, colour) in enumerate(zip(plans, COLOURS, strict=False)):
        places = [row + (number - (len(plans) - 1) / 2) * height for row in range(len(rows))]
        lengths = [abs(values[number]) for _, values in rows]
        axes.barh(places, lengths, height=height, color=colour, label=f"the {plan} plan")
        for place, length in zip(places, lengths, strict=True):
            text = f"{length:.2f}" if length >= 0.005 else f"{length:.3f}"
            axes.text(length, place, f" {text}", va="center", size=8, color=FAINT)
    axes.set_yticks(range(len(rows)), labels, color=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("per cent of the step's time, for one per cent better")
    axes.legend(loc="lower right", frameon=False, fontsize=10)
    set_title(figure, finding(plans, rows), "PanGu-alpha 200B on 2,048 Ascend 910; a gradient of "
              "the priced step gives all bars")  # fmt: skip
    save(figure, path)


def finding(plans: list[str], rows: list[tuple[str, list[float]]]) -> str:
    """What the picture shows: the weight of matrix units and of links, by plan."""
    found = dict(rows)
    links = [
        sum(abs(values[number]) for name, values in rows if _LINKS.fullmatch(name))
        for number in range(len(plans))
    ]
    cube = [abs(value) for value in found["chip.cube_flops_16bit"]]
    said = "; ".join(
        f"{plan} plan {one:.0%} and {two:.0%}"
        for plan, one, two in zip(plans, cube, links, strict=True)
    )
    return f"Matrix units and links bound the step: {said}"


_LINKS = re.compile(r"fabric\.\w+\.bandwidth_bytes_per_s")


def main(options: Figure) -> None:
    plot_constants(options.csv, options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    leave(run_program(main, Figure, __doc__))
