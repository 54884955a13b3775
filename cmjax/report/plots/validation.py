"""Predictions against published measurements, each as a share of what was published."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from cmjax.deploy.validation import ValidationRow, summary
from cmjax.report.figure_path import checked_path
from cmjax.report.plots import figure as fig
from cmjax.report.units import number, percent, quantity

_COLOURS = {"predict": fig.BLUE, "calibrate": "#A9A9A9"}
_ROLES = {"predict": "predicted end to end", "calibrate": "calibrated"}
_WITHIN = 0.10


def steps_compare_title(rows: Sequence[ValidationRow]) -> str:
    """The finding: how far off the predictions are; the calibrated rows where there are none."""
    found = summary(rows)
    role = "predict" if "predict" in found else next(iter(found))
    what = "End-to-end predictions" if role == "predict" else "Calibrated kernels"
    if found[role].rows == 1:
        return f"{what} vs published: {percent(found[role].worst_error)} off"
    return (
        f"{what} are {percent(found[role].mean_error)} off on average, "
        f"{percent(found[role].worst_error)} at worst"
    )


@fig.plain_text
def plot_steps_compare(rows: Sequence[ValidationRow], path: str | Path) -> None:
    """Draw one bar per row: predicted as percent of published, with the error and both numbers.

    Raises: ValueError without rows, or for a path that cannot be written.
    """
    checked_path(path)
    if not rows:
        raise ValueError("plot_steps_compare: no rows to draw")
    ordered = sorted(rows, key=lambda row: row.role != "predict")
    figure = fig.new_figure(1.6 + 0.38 * len(ordered))
    fig.set_title(figure, steps_compare_title(rows))
    _write_key(figure, [role for role in _ROLES if any(r.role == role for r in ordered)])
    labels = [textwrap.shorten(row.row, 44, placeholder=" …") for row in ordered]
    left = fig.widest_inches(figure, labels, 9.5) + 0.2
    axes = fig.add_axes(figure, left=left, right=2.15, top=0.85)
    top = max(1.15, *(1.05 * row.predicted / row.measured for row in ordered)) * 100
    axes.set(xlim=(0, top), ylim=(len(ordered) - 0.4, -0.6), xlabel="predicted, % of published")
    axes.set_yticks(range(len(ordered)), labels)
    fig.quiet_axes(axes, keep=("bottom",))
    axes.tick_params(axis="y", length=0, labelcolor=fig.INK, labelsize=9.5)
    band = (100 * (1 - _WITHIN), 100 * (1 + _WITHIN))
    axes.axvspan(*band, color=fig.PALE, zorder=0, lw=0)
    for y, row in enumerate(ordered):
        _draw_row(axes, y, row, top)
    axes.axvline(100, color=fig.INK, lw=1.5)
    note = f"published (grey: within {percent(_WITHIN, digits=0)})"
    axes.annotate(
        note, (100, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", ha="center", size=8.5, color=fig.FAINT,
    )  # fmt: skip
    fig.save(figure, path)


def _draw_row(axes, y: int, row: ValidationRow, top: float) -> None:
    share = 100 * row.predicted / row.measured
    colour = _COLOURS.get(row.role, fig.GREY)
    axes.barh(y, share, height=0.62, color=colour)
    error = percent(row.error, sign=True)
    style = {"va": "center", "size": 9, "weight": "bold"}
    if share > 0.25 * top:
        place, style = min(share, 100), style | {"ha": "right", "color": fig.text_colour(colour)}
        axes.text(place - 0.01 * top, y, error, **style)
    else:
        axes.text(share + 0.01 * top, y, error, ha="left", color=fig.INK, **style)
    beside = f"{number(row.predicted)} vs {quantity(row.key, row.measured)}"
    if row.key == "utilization":
        beside = f"{quantity(row.key, row.predicted)} vs {quantity(row.key, row.measured)}"
    axes.annotate(
        beside, (1, y), xycoords=("axes fraction", "data"), xytext=(5, 0),
        textcoords="offset points", va="center", size=8.5, color=fig.FAINT, annotation_clip=False,
    )  # fmt: skip


def _write_key(figure, roles: Sequence[str]) -> None:
    """What the colours mean, in the line under the title."""
    x, height = 0.12 / fig.WIDTH_INCHES, figure.get_figheight()
    for role in roles:
        colour = _COLOURS[role]
        box = {"facecolor": colour, "edgecolor": "none", "pad": 2.5}
        text = figure.text(
            x + 0.005, 1 - 0.43 / height, _ROLES[role], va="top", size=9,
            color=fig.text_colour(colour), bbox=box,
        )  # fmt: skip
        x += text.get_window_extent().width / figure.dpi / fig.WIDTH_INCHES + 0.025
