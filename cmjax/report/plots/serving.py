"""Figures of a replayed trace and of a capacity plan."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cmjax.report.figure_path import checked_path
from cmjax.report.plots import figure as fig
from cmjax.report.units import number, percent
from cmjax.serving import ServingResult
from cmjax.serving.planner import CapacityPlan, Judged


def queues_title(result: ServingResult) -> str:
    """The finding: whether the service keeps up, and its longest queue."""
    queue = result.gauge("prefill_queue") + result.gauge("decode_queue")
    longest = float(queue.max()) if queue.size else 0.0
    return f"{result.verdict.capitalize()}: up to {number(longest)} requests wait at a time"


@fig.plain_text
def plot_queues(result: ServingResult, path: str | Path) -> None:
    """Requests that wait and that decode, and busy instances, over the time of the trace.

    Raises: ValueError: a path that no figure can be written to.
    """
    checked_path(path)
    figure = fig.new_figure(4.6)
    minutes = result.gauge_bins_s / 60
    top = fig.add_axes(figure, left=0.75, bottom=2.35, top=0.78, right=1.3)
    lines = (
        ("prefill_queue", "wait for prefill", fig.VERMILION),
        ("decode_queue", "wait for decode", fig.ORANGE),
        ("decode_running", "decode", fig.BLUE),
    )
    _lines(top, minutes, [(result.gauge(n), words, colour) for n, words, colour in lines])
    top.set_ylabel("requests")
    bottom = fig.add_axes(figure, left=0.75, bottom=0.55, top=2.75, right=1.3)
    pools = result.service.pools
    shares = []
    first = "prefill" if "prefill" in pools else "colocated"
    shares.append((result.gauge("prefill_busy") / pools[first].instances, first, fig.VERMILION))
    if "decode" in pools:
        shares.append((result.gauge("decode_busy") / pools["decode"].instances, "decode", fig.BLUE))
    _lines(bottom, minutes, [(100 * share, words, colour) for share, words, colour in shares])
    bottom.set_ylim(0, 105)
    bottom.set_ylabel("busy instances, %")
    bottom.set_xlabel("minutes of the trace")
    fig.set_title(figure, queues_title(result), "Means over equal intervals of the trace")
    fig.save(figure, path)


def latency_title(result: ServingResult) -> str:
    """The finding: how many requests keep the SLO, or the median and tail of TTFT."""
    if result.replay.slo_ttft_s is not None or result.replay.slo_tpot_s is not None:
        return f"{percent(float(result.kept.mean()))} of the requests offered keep the SLO"
    found = result.latencies.ttft[~np.isnan(result.latencies.ttft)] * 1e3
    p50, p99 = np.percentile(found, (50, 99))
    return f"Half of the first tokens come within {number(p50)} ms, 99 % within {number(p99)} ms"


@fig.plain_text
def plot_latency(result: ServingResult, path: str | Path) -> None:
    """How many requests are slower than a TTFT, and than a TPOT.

    Raises: ValueError: a path that no figure can be written to.
    """
    checked_path(path)
    figure = fig.new_figure(3.6)
    found = result.latencies
    for left, right, seconds, slo, words in (
        (0.75, 4.25, found.ttft, result.replay.slo_ttft_s, "time to first token, ms"),
        (4.55, 0.25, found.tpot, result.replay.slo_tpot_s, "time per output token, ms"),
    ):
        axes = fig.add_axes(figure, left=left, right=right)
        known = np.sort(seconds[~np.isnan(seconds)]) * 1e3
        if known.size:
            axes.step(known, 100 * (1 - np.arange(len(known)) / len(known)), color=fig.BLUE)
            axes.set_xscale("log")
            axes.set_yscale("log")
            _plain_numbers(axes.xaxis, known[-1] / known[0])
            _plain_numbers(axes.yaxis, 1e9)
            axes.set_ylim(max(100 / len(known), 1e-3), 120)
        if slo is not None:
            axes.axvline(slo * 1e3, color=fig.VERMILION, lw=1.2, ls="--")
            axes.annotate(
                f"SLO {slo * 1e3:g}", (slo * 1e3, 100), xytext=(3, 0), textcoords="offset points",
                color=fig.VERMILION, size=9, va="top",
            )  # fmt: skip
        axes.set_xlabel(words)
        if left < 1:
            axes.set_ylabel("requests that are slower, %")
    fig.set_title(
        figure, latency_title(result), "Each curve falls from all requests to the slowest"
    )
    fig.save(figure, path)


def pareto_title(plan: CapacityPlan) -> str:
    """The finding: the best split."""
    prefill, decode = plan.best.service.prefill, plan.best.service.decode
    assert prefill is not None and decode is not None
    return (
        f"{prefill.instances} prefill of {prefill.npus} and {decode.instances} decode of "
        f"{decode.npus} NPUs serve {number(plan.best.goodput_requests_per_s)} requests/s"
    )


@fig.plain_text
def plot_pareto(plan: CapacityPlan, path: str | Path) -> None:
    """Output tokens per second and NPU against TPOT, a point per service that was simulated.

    Raises: ValueError: a path that no figure can be written to.
    """
    checked_path(path)
    figure = fig.new_figure(4.0)
    axes = fig.add_axes(figure, left=0.75)
    front = plan.pareto()
    for found in reversed([f for f in plan.tried if f.rate_scale]):  # the best on top
        best = found is plan.best
        axes.plot(*_point(found, plan.npus), "o", color=fig.VERMILION if best else fig.SKY, ms=6)
    axes.plot(*zip(*(_point(f, plan.npus) for f in front), strict=True), color=fig.BLUE, lw=1.2)
    named = {id(f): f for f in (*front, plan.best)}.values()
    for i, found in enumerate(sorted(named, key=lambda f: f.tpot_p50_ms)):
        prefill, decode = found.service.prefill, found.service.decode
        assert prefill is not None and decode is not None
        axes.annotate(
            f"{prefill.instances}x{prefill.npus} + {decode.instances}x{decode.npus}",
            _point(found, plan.npus), xytext=(6, -11) if i % 2 else (-6, 6),
            textcoords="offset points", size=8, color=fig.FAINT, ha="left" if i % 2 else "right",
        )  # fmt: skip
    axes.margins(x=0.18, y=0.12)
    axes.set_xlabel("time per output token, median, ms")
    axes.set_ylabel("output tokens/s per NPU")
    fig.set_title(
        figure, pareto_title(plan),
        "Prefill + decode instances; each at the largest rate that keeps the SLO",
    )  # fmt: skip
    fig.save(figure, path)


def _point(found: Judged, npus: int) -> tuple[float, float]:
    return found.tpot_p50_ms, found.output_tokens_per_s / npus


def _plain_numbers(axis, span: float) -> None:
    """Plain numbers on a logarithmic axis: at 1, 2 and 5 where it spans little, at 1 and 3 else."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _lines(axes, x, lines) -> None:
    """Lines whose names stand at their right end, moved apart where they would overlap."""
    most = max((float(y.max()) for y, _, _ in lines if y.size), default=0.0) or 1.0
    ends = []
    for y, words, colour in lines:
        axes.plot(x, y, color=colour, lw=1.4)
        ends.append([float(y[-max(len(y) // 20, 1) :].mean()) if y.size else 0.0, words, colour])
    ends.sort(key=lambda end: end[0])
    low = -np.inf
    for end in ends:
        at = max(end[0], low + 0.11 * most)
        low = at
        axes.annotate(
            end[1], (1, at), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", color=end[2], size=9, va="center",
        )  # fmt: skip
    axes.set_ylim(0, 1.08 * max(most, low))
    axes.set_xlim(0, float(x[-1]) if x.size else 1.0)
