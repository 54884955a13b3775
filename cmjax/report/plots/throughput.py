"""Throughput against latency while the batch grows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmjax.report.figure_path import checked_path
from cmjax.report.plots import figure as fig
from cmjax.report.units import number


@dataclass(frozen=True)
class ThroughputPoint:
    """One batch of a sweep.

    Attributes:
      batch: concurrent requests per NPU.
      tpot_ms: time per output token.
      tokens_per_s_per_npu: throughput.
      fits_hbm: whether weights and caches fit; points that do not are drawn hollow.
    """

    batch: float
    tpot_ms: float
    tokens_per_s_per_npu: float
    fits_hbm: bool = True

    @staticmethod
    def of(result: Mapping) -> "ThroughputPoint":
        """From what `Predictor.predict` returns for decode; ValueError if it is of a prefill."""
        if "tpot_ms" not in result:
            raise ValueError("ThroughputPoint: expected a decode result, got one without tpot_ms")
        return ThroughputPoint(
            result["requests"]["batch"],
            result["tpot_ms"],
            result["tokens_per_s_per_npu"],
            result["fits_hbm"],
        )


def best_within(points: Sequence[ThroughputPoint], slo_ms: float) -> ThroughputPoint | None:
    """The point of highest throughput that fits HBM and keeps TPOT within `slo_ms`."""
    allowed = [p for p in points if p.fits_hbm and p.tpot_ms <= slo_ms]
    return max(allowed, key=lambda p: p.tokens_per_s_per_npu, default=None)


def throughput_title(points: Sequence[ThroughputPoint], slo_ms: Sequence[float] = ()) -> str:
    """The finding: the best batch under the loosest SLO that can be met, or the best of all."""
    for slo in sorted(slo_ms, reverse=True):
        best = best_within(points, slo)
        if best is not None:
            return (
                f"Within {slo:g} ms per token: {number(best.tokens_per_s_per_npu)} tokens/s "
                f"per NPU at batch {best.batch:g}"
            )
    best = best_within(points, float("inf"))
    if best is None:
        return "No batch fits the memory of a die"
    told = f"{number(best.tokens_per_s_per_npu)} tokens/s per NPU at batch {best.batch:g}"
    return f"No batch meets the SLO; the most is {told}" if slo_ms else f"At most {told}"


@fig.plain_text
def plot_throughput(
    points: Sequence[ThroughputPoint], path: str | Path, *, slo_ms: Sequence[float] = ()
) -> None:
    """Draw throughput per NPU over TPOT, points named by batch, SLOs as vertical lines.

    Raises: ValueError without points, or for a path that cannot be written.
    """
    checked_path(path)
    if not points:
        raise ValueError("plot_throughput: no points to draw")
    points = sorted(points, key=lambda p: p.batch)
    figure = fig.new_figure(4.4)
    notes = ["Numbers at the points: requests per NPU."]
    if not all(p.fits_hbm for p in points):
        notes.append("Hollow: does not fit the memory.")
    if slo_ms:
        notes.append("Ringed: the best within each SLO.")
    fig.set_title(figure, throughput_title(points, slo_ms), " ".join(notes))
    axes = fig.add_axes(figure, left=0.85, top=0.95, right=0.35)
    xs = [p.tpot_ms for p in points]
    ys = [p.tokens_per_s_per_npu for p in points]
    axes.set(
        xlim=(0, 1.06 * max(*xs, *slo_ms, 0.0)),
        ylim=(0, 1.12 * max(ys)),
        xlabel="time per output token, TPOT (ms)",
        ylabel="throughput (tokens/s per NPU)",
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=fig.PALE)
    axes.set_axisbelow(True)
    axes.plot(xs, ys, color=fig.BLUE, lw=1.8)
    for point in points:
        face = fig.BLUE if point.fits_hbm else "white"
        style = {"marker": "o", "ms": 6, "mfc": face, "mec": fig.BLUE, "zorder": 3}
        axes.plot([point.tpot_ms], [point.tokens_per_s_per_npu], **style)
    _name_points(axes, points)
    for slo in slo_ms:
        _draw_slo(axes, slo, best_within(points, slo))
    fig.save(figure, path)


def _name_points(axes, points: Sequence[ThroughputPoint]) -> None:
    """Batches beside their points, the ends first, leaving out what would overlap."""
    taken = []
    order = [points[0], points[-1], *points[1:-1]] if len(points) > 1 else points
    for point in order:
        label = axes.annotate(
            f"{point.batch:g}", (point.tpot_ms, point.tokens_per_s_per_npu), xytext=(6, -11),
            textcoords="offset points", size=9, color=fig.INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
        box = label.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            label.remove()
        else:
            taken.append(box)


def _draw_slo(axes, slo: float, best: ThroughputPoint | None) -> None:
    fig.draw_limit(axes, slo, f"SLO {slo:g} ms")
    if best is not None:
        ring = {"marker": "o", "ms": 12, "mfc": "none", "mec": fig.VERMILION, "mew": 1.8}
        axes.plot([best.tpot_ms], [best.tokens_per_s_per_npu], zorder=4, **ring)
