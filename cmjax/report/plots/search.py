"""Figure of a search over deployments: throughput against latency, and what nothing beats."""

from pathlib import Path

import numpy as np

from cmjax.deploy import DeploymentSearch
from cmjax.report.figure_path import checked_path
from cmjax.report.plots import figure as fig
from cmjax.report.units import number

_NAMED = 6


def search_title(found: DeploymentSearch) -> str:
    """The finding: the best deployment, and what it reaches."""
    best = found.best
    assert best.requests.batch is not None
    reached = number(float(best.tokens_per_s_per_npu))
    limit = "" if np.isinf(found.limit_s) else f" within {found.limit_s * 1e3:g} ms"
    return (
        f"{best.deployment.instance_npus} NPUs at batch {float(best.requests.batch):g} give most"
        f"{limit}: {reached} tokens/s per NPU"
    )


def plot_search(found: DeploymentSearch, path: str | Path) -> None:
    """Tokens per second and NPU against TPOT or TTFT: a point per candidate, a line for the front.

    Raises: ValueError: a path that no figure can be written to.
    """
    checked_path(path)
    figure = fig.new_figure(4.4)
    axes = fig.add_axes(figure, left=0.85, top=0.95, right=0.35)
    latency_ms = found.latency_s * 1e3
    front = found.pareto()
    shown = latency_ms <= 1.6 * latency_ms[front].max()
    axes.plot(latency_ms[shown], found.tokens_per_s_per_npu[shown], ".", color=fig.SKY, ms=3)
    axes.plot(latency_ms[front], found.tokens_per_s_per_npu[front], color=fig.BLUE, lw=1.8)
    best = int(np.where(found.within, found.tokens_per_s_per_npu, -np.inf).argmax())
    steps = np.linspace(0, len(front) - 1, _NAMED).round().astype(int)
    near = 0.15 * latency_ms[front].max()
    named = [i for i in front[steps].tolist() if abs(latency_ms[i] - latency_ms[best]) > near]
    for row in (*named, best):
        at = latency_ms[row], found.tokens_per_s_per_npu[row]
        is_best = row == best
        axes.plot(*at, "o", ms=7 if is_best else 4, color=fig.VERMILION if is_best else fig.BLUE)
        one = found.deployments[found.choice[row]]
        between = "\n" if at[0] < 2 * near else " "  # two lines where the axis is close
        axes.annotate(
            f"{one.instance_npus} NPUs,{between}batch {found.batch[row]:g}", at, xytext=(-6, 6),
            textcoords="offset points", size=8, ha="right",
            color=fig.INK if is_best else fig.FAINT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )  # fmt: skip
    if np.isfinite(found.limit_s):
        fig.draw_limit(axes, found.limit_s * 1e3, f"limit {found.limit_s * 1e3:g} ms")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("throughput (tokens/s per NPU)")
    axes.set_xlabel(
        "time per output token, TPOT (ms)" if found.decoding else "time to first token, TTFT (ms)"
    )
    fig.set_title(
        figure, search_title(found), "A point per candidate; the line joins those nothing beats"
    )
    fig.save(figure, path)
