"""The picture of `benchmarks.generate`: decoding beside its bound, a panel for every batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmjax.report.figure_path import checked_path
from cmjax.report.plots import figure as fig
from cmjax.report.units import percent

_EQUAL_BITS = (
    ("cmjax bfloat16", "transformers bfloat16"),
    ("cmjax msd_w8a16", "llama.cpp Q8_0"),
    ("cmjax msd_w4a16", "llama.cpp Q4_0"),
)


@fig.plain_text
def plot_decode(rows: Sequence[Any], path: str | Path) -> None:
    """Bars of tokens per second, and a mark at each system's bandwidth bound.

    Args:
      rows: of `benchmarks.generate.Row`; those of the shortest prompt are drawn.
    Raises: ValueError: nothing to draw, or a path that cannot be written.
    """
    checked_path(path)
    if not rows:
        raise ValueError("plot_decode: no rows to draw")
    prompt = min(row.prompt for row in rows)
    rows = [row for row in rows if row.prompt == prompt]
    batches = sorted({row.batch for row in rows})
    systems = list(dict.fromkeys(row.system for row in rows))
    panel = 0.55 + 0.21 * len(systems)
    height = 0.65 + len(batches) * panel + 0.35
    figure = fig.new_figure(height)
    how = f"Prompts of {prompt} tokens. Black marks: the most that reading the weights allows."
    fig.set_title(figure, _finding(rows), how)
    left = fig.widest_inches(figure, systems, 9) + 0.3
    for number, batch in enumerate(batches):
        bottom = 0.5 + panel * (len(batches) - 1 - number)
        top = height - bottom - panel + 0.5
        axes = fig.add_axes(figure, left=left, bottom=bottom, right=0.6, top=top)
        _panel(axes, [row for row in rows if row.batch == batch], batch)
        if number == len(batches) - 1:
            axes.set_xlabel("decoded tokens/s")
    fig.save(figure, path)


def _panel(axes: Any, rows: Sequence[Any], batch: int) -> None:
    names = [row.system for row in rows]
    own = [name.startswith("cmjax") for name in names]
    speeds = [row.decode_tokens_per_s for row in rows]
    places = range(len(rows))
    axes.barh(places, speeds, color=[fig.BLUE if o else fig.ORANGE for o in own], height=0.7)
    bounds = [row.bound_tokens_per_s for row in rows]
    shown = [bound for bound in bounds if bound <= 2.2 * max(speeds)]  # the bars stay readable
    most = 1.05 * max(speeds + shown)
    for place, row in zip(places, rows, strict=True):
        axes.text(
            row.decode_tokens_per_s, place, f"{row.decode_tokens_per_s:,.0f}  ",
            va="center", ha="right", size=8, color="white",
        )  # fmt: skip
        if row.bound_tokens_per_s <= most:
            bound = [row.bound_tokens_per_s] * 2
            axes.plot(bound, [place - 0.4, place + 0.4], color=fig.INK, lw=1.6)
    axes.set(yticks=list(places), yticklabels=names, xlim=(0, most), ylim=(len(rows) - 0.4, -0.6))
    axes.set_title(f"batch {batch}", size=9, loc="left", color=fig.INK, pad=3)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _finding(rows: Sequence[Any]) -> str:
    """How fast the smallest batch decodes: over the peers of equal bits, else over the bound."""
    batch = min(row.batch for row in rows)
    at = {row.system: row for row in rows if row.batch == batch}
    speeds = {system: row.decode_tokens_per_s for system, row in at.items()}
    pairs = [pair for pair in _EQUAL_BITS if set(pair) <= speeds.keys()]
    if pairs:
        ratios = (
            f"{speeds[own] / speeds[peer]:.2f}× {peer} in {own.removeprefix('cmjax ')}"
            for own, peer in pairs
        )
        return f"Batch {batch} decodes at {', '.join(ratios)}"
    best = max(at.values(), key=lambda row: row.decode_tokens_per_s)
    share = percent(best.decode_tokens_per_s / best.bound_tokens_per_s, digits=0)
    return f"Batch {batch} decodes fastest in {best.system}, at {share} of memory's bound"
