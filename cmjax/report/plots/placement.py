"""How evenly a placement loads the ranks, and how uneven the experts are.

PAR (peak-to-average ratio) of a layer is max / mean of its tokens per rank.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from cmjax.report.figure_path import checked_path
from cmjax.report.plots import figure as fig
from cmjax.report.units import number, percent

_ABREAST = 4  # curves side by side: more leave no room for their labels
_SATURATED = 4.0  # times the mean: beyond, one hot rank would bleach all others
_MAP = LinearSegmentedColormap.from_list(
    "load",
    [(0.0, "#A9CCE3"), (0.5, "#FBFBFB"), (0.62, "#F0B98D"), (0.8, fig.VERMILION), (1.0, "#4A1500")],
)


def placement_title(plan_loads: Mapping[str, Float[np.ndarray, "layers ranks"]]) -> str:
    """The finding: the slowest rank over the mean, per method, mean over layers."""
    pars = {name: float(_relative(loads).max(-1).mean()) for name, loads in plan_loads.items()}
    return "Busiest rank over mean: " + ", ".join(f"{n} {par:.2f}×" for n, par in pars.items())


@fig.plain_text
def plot_placement(
    plan_loads: Mapping[str, Float[np.ndarray, "layers ranks"]], path: str | Path
) -> None:
    """Draw one heat map of ranks by layers per method, in times the layer's mean, on one scale.

    Args:
      plan_loads: tokens per layer and rank by method, such as `plan.tokens_per_rank(counts)`.
      path: ends in .png or .svg.
    Raises: ValueError without methods, for arrays that are no loads, or a path that cannot be
      written.
    """
    checked_path(path)
    if not plan_loads:
        raise ValueError("plot_placement: no placements to draw")
    maps = {name: _relative(loads) for name, loads in plan_loads.items()}
    figure = fig.new_figure(1.35 + 1.35 * len(maps))
    how = "Orange: ranks with more tokens than their layer's mean; all others wait for them."
    fig.set_title(figure, placement_title(plan_loads), how)
    high = max(float(loads.max()) for loads in maps.values())
    norm = TwoSlopeNorm(1.0, 0.0, min(max(high, 2.0), _SATURATED))
    height = figure.get_figheight()
    for index, (name, loads) in enumerate(maps.items()):
        bottom = 0.62 + 1.35 * (len(maps) - 1 - index)
        axes = fig.add_axes(
            figure, left=0.75, right=1.35, bottom=bottom, top=height - bottom - 1.08
        )
        # Drawn as pixels and not smoothed: a single hot rank must stay visible.
        axes.imshow(loads, cmap=_MAP, norm=norm, aspect="auto", interpolation="nearest")
        title = f"{name}: {float(loads.max(-1).mean()):.2f}× (worst layer {loads.max():.2f}×)"
        axes.set_title(title, loc="left", size=10, color=fig.INK, pad=4)
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        fig.quiet_axes(axes, keep=("left", "bottom", "right", "top"))
        if index < len(maps) - 1:
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel("rank")
    place = figure.add_axes((1 - 1.15 / 8, 0.62 / height, 0.16 / 8, 1 - (0.62 + 0.71) / height))
    bar = figure.colorbar(
        ScalarMappable(norm, _MAP),
        cax=place,
        extend="max" if high > _SATURATED else "neither",
        extendfrac=0.03,
    )
    bar.set_label("tokens over the layer's mean (×)", size=9, color=fig.INK)
    bar.set_ticks([0, 0.5, 1, *np.linspace(1, float(norm.vmax or 2), 4)[1:]])
    bar.ax.yaxis.set_major_formatter("{x:.2g}")
    bar.ax.tick_params(labelsize=9, colors=fig.FAINT)
    bar.outline.set_visible(False)  # type: ignore[operator]
    fig.save(figure, path)


def load_curve_title(loads: Float[np.ndarray, "layers experts"]) -> str:
    """The finding: what the busiest tenth of the experts takes, and the busiest one."""
    curve = -np.sort(-_relative(loads), axis=-1).mean(0)
    tenth = max(1, round(len(curve) / 10))
    share = float(curve[:tenth].sum() / curve.sum())
    return (
        f"The busiest {tenth} of {len(curve)} experts take {percent(share, digits=0)} of the "
        f"tokens; the busiest, {curve[0]:.1f}× the mean"
    )


@fig.plain_text
def plot_load_curve(loads: Float[np.ndarray, "layers experts"], path: str | Path) -> None:
    """Draw experts from busiest to idlest over the mean load: mean of layers, and their range.

    Raises: ValueError for an array that is no loads, or a path that cannot be written.
    """
    checked_path(path)
    sorted_loads = -np.sort(-_relative(loads), axis=-1)
    experts = np.arange(1, sorted_loads.shape[1] + 1)
    figure = fig.new_figure(3.8)
    how = "Line: mean over layers. Band: lowest and highest layer. Dashed: an even load."
    fig.set_title(figure, load_curve_title(loads), how)
    axes = fig.add_axes(figure, left=0.75)
    low, high = sorted_loads.min(0), sorted_loads.max(0)
    axes.fill_between(experts, low, high, color=fig.BLUE, alpha=0.2, lw=0)
    axes.plot(experts, sorted_loads.mean(0), color=fig.BLUE, lw=2)
    axes.axhline(1, color=fig.INK, lw=1, ls="--")
    axes.set(
        xlim=(0, len(experts) + 1), ylim=(0, None),
        xlabel="experts, busiest first", ylabel="tokens over the mean (×)",
    )  # fmt: skip
    fig.save(figure, path)


def rank_curve_title(plan_loads: Mapping[str, Float[np.ndarray, "layers ranks"]]) -> str:
    """The finding: what the worst layer's busiest rank has, per method."""
    worst = {name: float(_relative(loads).max()) for name, loads in plan_loads.items()}
    return "Busiest rank of the worst layer: " + ", ".join(
        f"{n} {par:.2f}×" for n, par in worst.items()
    )


@fig.plain_text
def plot_rank_curve(
    plan_loads: Mapping[str, Float[np.ndarray, "layers ranks"]], path: str | Path
) -> None:
    """Draw each method's ranks from busiest to idlest, beside each other on one scale.

    Args:
      plan_loads: tokens per layer and rank by method, such as `plan.tokens_per_rank(counts)`.
      path: ends in .png or .svg.
    Raises: as `plot_placement`.
    """
    checked_path(path)
    if not plan_loads:
        raise ValueError("plot_rank_curve: no placements to draw")
    curves = {name: -np.sort(-_relative(loads), axis=-1) for name, loads in plan_loads.items()}
    rows = -(-len(curves) // _ABREAST)
    figure = fig.new_figure(0.75 + 3.1 * rows)
    how = "Line: mean over layers. Band: lowest and highest layer. Dashed: perfect balance."
    fig.set_title(figure, rank_curve_title(plan_loads), how)
    high = max(float(curve.max()) for curve in curves.values())
    abreast = min(len(curves), _ABREAST)
    width = (fig.WIDTH_INCHES - 0.75 - 0.2 - 0.25 * (abreast - 1)) / abreast
    for index, (name, curve) in enumerate(curves.items()):
        row, column = divmod(index, _ABREAST)
        left = 0.75 + column * (width + 0.25)
        axes = fig.add_axes(
            figure, left=left, right=fig.WIDTH_INCHES - left - width,
            top=0.95 + 3.1 * row, bottom=0.62 + 3.1 * (rows - 1 - row),
        )  # fmt: skip
        ranks = np.arange(1, curve.shape[1] + 1)
        axes.fill_between(ranks, curve.min(0), curve.max(0), color=fig.BLUE, alpha=0.2, lw=0)
        axes.plot(ranks, curve.mean(0), color=fig.BLUE, lw=2)
        axes.axhline(1, color=fig.INK, lw=1, ls="--")
        axes.set(xlim=(1, max(2, len(ranks))), ylim=(0, 1.05 * high), xlabel="ranks, busiest first")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(name, loc="left", size=10, color=fig.INK, pad=4)
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel("tokens over the mean (×)")
    fig.save(figure, path)


def node_bytes_title(received: Mapping[str, Float[np.ndarray, "nodes"]]) -> str:
    """The finding: what the busiest node receives, per method."""
    _, unit, scale = _scaled(received)
    busiest = (f"{name} {number(loads.max() / scale)}" for name, loads in received.items())
    return f"Busiest node receives a step, in {unit}: {', '.join(busiest)}"


@fig.plain_text
def plot_node_bytes(received: Mapping[str, Float[np.ndarray, "nodes"]], path: str | Path) -> None:
    """Draw what each node receives from other nodes in a step, methods side by side.

    Args:
      received: bytes per node by method, all layers together, dispatch and combine.
      path: ends in .png or .svg.
    Raises: ValueError without methods, for bytes that are negative or not finite, for methods of
      different nodes, or a path that cannot be written.
    """
    checked_path(path)
    values, unit, scale = _scaled(received)
    figure = fig.new_figure(3.6)
    how = (
        "Every copy of a token sent for itself. Dashed: the mean, which no placement then changes."
    )
    fig.set_title(figure, node_bytes_title(received), how)
    axes = fig.add_axes(figure, left=0.75, right=1.35, top=0.75)
    nodes = np.arange(len(next(iter(values.values()))))
    colors = (fig.GREY, fig.SKY, fig.BLUE, fig.GREEN, fig.ORANGE, fig.PURPLE)
    width = 0.8 / len(values)
    for index, (name, loads) in enumerate(values.items()):
        place = nodes + (index - (len(values) - 1) / 2) * width
        color = colors[index % len(colors)]
        axes.bar(place, loads / scale, width, color=color, label=name, lw=0)
    mean = float(np.mean([loads.mean() for loads in values.values()])) / scale
    axes.axhline(mean, color=fig.INK, lw=1, ls="--")
    axes.set(xlim=(-0.6, len(nodes) - 0.4), xlabel="node", ylabel=f"received in a step ({unit})")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, borderaxespad=0
    )
    fig.save(figure, path)


def _scaled(received):
    """Arrays of bytes, a readable unit, and its size."""
    values = {name: np.asarray(loads, float) for name, loads in received.items()}
    if not values:
        raise ValueError("expected the bytes of at least one placement")
    shapes = {loads.shape for loads in values.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1 or (0,) in shapes:
        raise ValueError(f"expected bytes of the same nodes for all, got shapes {sorted(shapes)}")
    for name, loads in values.items():
        if not np.isfinite(loads).all() or loads.min() < 0:
            raise ValueError(f"expected finite bytes of 0 or more, got others for {name}")
    most = max(float(loads.max()) for loads in values.values())
    unit, scale = next(
        ((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= s), ("bytes", 1.0)
    )
    return values, unit, scale


def _relative(loads) -> Float[np.ndarray, "layers places"]:
    """Loads over their layer's mean."""
    loads = np.asarray(loads, float)
    if loads.ndim != 2 or 0 in loads.shape or not np.isfinite(loads).all() or loads.min() < 0:
        raise ValueError(
            f"expected finite loads of 0 or more of shape [layers, ranks or experts], "
            f"got shape {loads.shape}"
        )
    if (loads.sum(-1) == 0).any():
        raise ValueError("expected tokens in every layer, got a layer of zeros")
    return loads / loads.mean(-1, keepdims=True)
