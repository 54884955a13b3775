"""Accuracy against context length, one line a method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cmjax.report.plots import figure as fig

# name of the curve -> what is written at it, colour, marker
STYLES = {
    "XL3M, window filled": ("XL3M", fig.BLUE, "o"),
    "never unsure: XL3M, window filled": ("XL3M, model\nnever unsure", fig.SKY, "o"),
    "RoPE YaRN": ("YaRN", fig.GREEN, "s"),
    "RoPE NTK": ("NTK", fig.ORANGE, "^"),
    "RoPE linear": ("linear", fig.PURPLE, "v"),
    "plain": ("plain", fig.VERMILION, "D"),
    "sliding window": ("sliding window", fig.GREY, "P"),
}
Curve = Sequence[tuple[int, float, float, float]]  # tokens, accuracy, ends of its interval


def draw(curves: Mapping[str, Curve], trained: int, path: Path) -> None:
    """One line a method with its 95 % interval, labelled beside the axes.

    Raises: ValueError: `path` is no .png or .svg of a folder that exists.
    """
    figure = fig.new_figure(4.4)
    longest = max(n for n, *_ in curves["XL3M, window filled"])
    held = min(accuracy for _, accuracy, *_ in curves["XL3M, window filled"])
    least = "" if held == 1 else "at least "
    fig.set_title(
        figure,
        f"XL3M answers {least}{held:.0%} up to {longest // trained:,} times the trained "
        "length; the others fall".replace("%", " %"),
        "One pair of key and value is asked for, among others and filler. Bars: 95 % interval. "
        "Dashed: trained length.",
    )
    axes = fig.add_axes(figure, left=0.75, right=1.45, top=0.8)
    for name, (label, colour, marker) in STYLES.items():
        n, accuracy, low, high = zip(*curves[name], strict=True)
        axes.plot(n, accuracy, color=colour, marker=marker, ms=5, lw=1.8, label=label)
        axes.vlines(n, low, high, color=colour, alpha=0.45, lw=1.5)
    axes.axvline(trained, color=fig.GREY, ls="--", lw=1, zorder=0)
    axes.set_xscale("log", base=2)
    ticks = sorted({n for curve in curves.values() for n, *_ in curve})
    ticks = [n for n in ticks if n == longest or (n < longest // 2 and _is_power_of_4(n, trained))]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set(ylim=(-0.03, 1.03), xlabel="context, tokens", ylabel="questions answered rightly")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}".replace("%", " %"))
    axes.grid(axis="y", color=fig.PALE)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="center right", frameon=False, fontsize=9,
        bbox_to_anchor=(0.995, 0.5), labelspacing=0.9,
    )  # fmt: skip
    fig.save(figure, path)


def _is_power_of_4(n: int, trained: int) -> bool:
    """Whether `n` is the trained length times 1, 4, 16 and so on: labels that do not crowd."""
    return (n // trained).bit_length() % 2 == 1
