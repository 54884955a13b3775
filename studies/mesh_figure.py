"""The picture of `studies.mesh`: bytes by tier, executed and priced, and time against ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmjax.report.plots.figure import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    add_axes,
    new_figure,
    save,
    set_title,
)

_LINKS = {"die": (SKY, "other die"), "node": (ORANGE, "same node"),
          "supernode": (BLUE, "other node")}  # fmt: skip


def plot_meshes(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: bytes of one prefill and one decode step by tier. Right: CPU seconds of their parts.

    Args:
      found: results of `studies.mesh_worker`, one per mesh.
      path: .png or .svg.
    Raises: ValueError for another suffix.
    """
    found = sorted(found, key=lambda result: result["ranks"])
    figure = new_figure(3.9)
    _bytes(add_axes(figure, left=0.75, right=4.15), found)
    _seconds(add_axes(figure, left=4.75, right=0.95), found)
    equal = all(
        part["moved"][link] == round(part["priced_moved"][link])
        for result in found
        for part in result["phases"].values()
        for link in _LINKS
    )
    finding = (
        "The price assumes the very bytes that the executed model moves, link by link"
        if equal
        else "What the price assumes and what moves differ"
    )
    set_title(
        figure,
        finding,
        "Left: a prefill and a decode step, all ranks; bars executed, diamonds priced. "
        "Right: CPU time on this machine.",
    )
    save(figure, path)


def _bytes(axes, found: Sequence[dict[str, Any]]) -> None:
    many = [result for result in found if result["ranks"] > 1]
    for group, result in enumerate(many):
        for place, (link, (colour, _)) in enumerate(_LINKS.items()):
            x = group + 0.27 * (place - 1)
            moved, priced = (
                sum(part[field][link] for part in result["phases"].values()) / 1e6
                for field in ("moved", "priced_moved")
            )
            if moved or priced:
                axes.bar(x, moved, width=0.25, color=colour)
                axes.plot(x, priced, "D", color="white", markeredgecolor=INK, markersize=5)
            else:  # one rank per NPU: no link between dies
                axes.text(x, 0.02, "none", rotation=90, size=8, color=FAINT, ha="center",
                          va="bottom", transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 12)  # room for the names
    axes.set_xticks(range(len(many)), [f"{r['ranks']}\n{r['mesh']}" for r in many])
    axes.set_ylabel("MB moved")
    axes.set_xlabel("ranks, nodes x NPUs x dies")
    for place, (colour, name) in enumerate(_LINKS.values()):
        axes.text(0.02, 0.97 - 0.075 * place, f"■ {name}", color=colour, size=9, va="top",
                  weight="bold", transform=axes.transAxes)  # fmt: skip


def _seconds(axes, found: Sequence[dict[str, Any]]) -> None:
    ranks = [result["ranks"] for result in found]
    lines = {
        "start": (PURPLE, [result["start"]["cpu_s"] for result in found]),
        "compile": (GREEN, [result["compile"]["cpu_s"] for result in found]),
        "prefill": (BLUE, [result["prefill"]["cpu_s"] for result in found]),
        "decode step": (VERMILION, [min(result["steps"]["cpu_s"]) for result in found]),
    }
    above = float("inf")
    for name, (colour, seconds) in sorted(lines.items(), key=lambda line: -line[1][1][-1]):
        axes.plot(ranks, seconds, "o-", color=colour, markersize=5)
        close = seconds[-1] > above / 1.6  # names would touch
        axes.annotate(name, (ranks[-1], seconds[-1]), xytext=(6, -9 if close else 0),
                      textcoords="offset points", color=colour, size=9, va="center")  # fmt: skip
        above = seconds[-1]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.set_ylabel("CPU seconds")
