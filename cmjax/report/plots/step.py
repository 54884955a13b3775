"""What a step is made of: its critical path, and how busy each stream is, block by block.

Streams overlap, so the times of the blocks add up to more than the step. Two readings do add up:
the critical path (the chain of operations whose end is the end of the step) with the host's time,
and each stream's busy time with its idle time.
"""

from collections.abc import Mapping
from pathlib import Path

from cmjax.cost.timeline import Timeline
from cmjax.report.blocks import BLOCKS, block_of, roll_up
from cmjax.report.figure_path import checked_path
from cmjax.report.plots import figure as fig
from cmjax.report.units import number

CRITICAL, ALL = "critical path", "all streams"
HOST, IDLE, REST = "host", "idle", "rest"
_SMALL = 0.035  # of the axis: parts below share one segment
_NEGLIGIBLE = 0.01  # of the step: streams that work less are not drawn
_NAMES = {**BLOCKS, HOST: "host", IDLE: "idle", REST: "rest"}
_EXCHANGES = "dispatch and combine"
_PLURAL = ("experts", _EXCHANGES)
_COLOURS = {**fig.BLOCK_COLOURS, HOST: "#BDBDBD", IDLE: fig.PALE, REST: fig.GREY}


def step_lanes(result: Mapping, timeline: Timeline | None = None) -> dict[str, dict[str, float]]:
    """Milliseconds by lane and block. With a timeline, every lane adds up to the step.

    A single stream is its own critical path; it is not listed twice.

    Args:
      result: as `Predictor.report` returns it.
      timeline: the one `result` was made from; without it, one lane holds the blocks of all
        streams, whose sum exceeds the step where streams overlap.
    """
    step_ms = result["step_ms"]
    if timeline is None:
        blocks = roll_up(result["breakdown"])
        return {ALL: blocks | _remainder(IDLE, step_ms, blocks)}
    path = _by_block(timeline.critical_path())
    streams = {
        name: _by_block([e for e in timeline.events() if e.stream == name])
        for name in timeline.program.streams
    }
    by_load = sorted(streams, key=lambda name: -sum(streams[name].values()))
    busy = {n: streams[n] for n in by_load if sum(streams[n].values()) > _NEGLIGIBLE * step_ms}
    lanes = {name: blocks | _remainder(IDLE, step_ms, blocks) for name, blocks in busy.items()}
    critical = {CRITICAL: path | _remainder(HOST, step_ms, path)}
    return critical | (lanes if len(lanes) > 1 else {})


def step_title(result: Mapping, timeline: Timeline | None = None) -> str:
    """The finding: which block sets the step (with a timeline) or takes most of it."""
    parts = dict(next(iter(step_lanes(result, timeline).values())))
    parts[_EXCHANGES] = sum(parts.pop(block, 0.0) for block in ("dispatch", "combine"))
    largest = max(parts.keys() - {IDLE}, key=parts.__getitem__)
    name = _NAMES.get(largest, largest)
    name = name[0].upper() + name[1:]
    decoding = "tpot_ms" in result
    what = f"the {'decode' if decoding else 'prefill'} step"
    sets, is_ = ("set", "are") if largest in _PLURAL else ("sets", "is")
    verb = f"{sets} {what}" if timeline is not None else f"{is_} the largest part of {what}"
    title = f"{name} {verb}: {number(result['step_ms'])} ms"
    return title + (f", {number(result['tpot_ms'])} ms per token" if decoding else "")


@fig.plain_text
def plot_step(result: Mapping, path: str | Path, timeline: Timeline | None = None) -> None:
    """Draw the step as horizontal stacked bars on one time axis, one bar per lane.

    Args: see `step_lanes`; `path` ends in .png or .svg.
    Raises: ValueError for a path that cannot be written.
    """
    checked_path(path)
    lanes = step_lanes(result, timeline)
    figure = fig.new_figure(1.55 + 0.76 * len(lanes))
    right = max(sum(parts.values()) for parts in lanes.values())
    overlap = right > 1.001 * result["step_ms"]
    if timeline is None:
        how = "Work of all streams, which overlap: together it takes longer than the step."
        how = how if overlap else "Work of all streams."
    else:
        how = "Top: the chain of operations that sets the step. Below: what each stream does."
        how = how if len(lanes) > 1 else "The chain of operations that sets the step."
    fig.set_title(figure, step_title(result, timeline), how)
    labels = [_lane_label(n, p) for n, p in lanes.items()]
    axes = fig.add_axes(figure, left=fig.widest_inches(figure, labels, 10) + 0.2, top=0.85)
    axes.set(
        xlim=(0, right),
        ylim=(len(lanes) - 0.3, -0.5 if overlap else -0.35),
        xlabel="time in the step (ms)",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}" if right > 20 else "{x:g}")
    axes.set_yticks(range(len(lanes)), labels)
    fig.quiet_axes(axes, keep=("bottom",))
    axes.tick_params(axis="y", length=0, labelcolor=fig.INK, labelsize=10)
    for y, parts in enumerate(lanes.values()):
        _draw_lane(axes, y, parts, right)
    if overlap:
        _mark_step(axes, result["step_ms"])
    fig.save(figure, path)


def _mark_step(axes, step_ms: float) -> None:
    """How long the step is, as a bracket over a bar that is longer."""
    ends = {"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "color": fig.INK, "shrinkA": 0}
    axes.annotate("", (0, -0.4), (step_ms, -0.4), arrowprops=ends | {"shrinkB": 0})
    label = f"step {number(step_ms)} ms"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.text(step_ms / 2, -0.4, label, ha="center", va="center", size=9, color=fig.INK, bbox=box)


def _draw_lane(axes, y: int, parts: Mapping[str, float], right: float) -> None:
    """One stacked bar; what is too small for a label is one grey segment, listed underneath."""
    small = {k: v for k, v in parts.items() if v < _SMALL * right and k != IDLE}
    small = small if len(small) > 1 else {}
    shown = {k: v for k, v in parts.items() if k not in small and k != IDLE}
    rest = {REST: sum(small.values())} if small else {}
    ends = {k: v for k, v in parts.items() if k == IDLE}
    left, notes = 0.0, []
    for block, ms in (shown | rest | ends).items():
        colour = _COLOURS[block]
        axes.barh(y, ms, left=left, height=0.56, color=colour, edgecolor="white", lw=1)
        name, value = _NAMES[block], number(ms)
        labels = [f"{name} {value} ms", f"{name}\n{value}"]
        style = {"size": 9, "color": fig.FAINT if block == IDLE else fig.text_colour(colour)}
        fitted = fig.first_label_that_fits(axes, left + ms / 2, y, ms, 0.56, labels, **style)
        if block == REST:
            notes.append((left + ms / 2, colour, _listed(small)))
        elif fitted is None and block != IDLE:
            notes.append((left + ms / 2, colour, labels[0]))
        left += ms
    _write_notes(axes, y, notes, right)


def _write_notes(axes, y, notes, right) -> None:
    """Labels of narrow parts under the bar, each after a square of its part's colour.

    Placed from the right, as near to their part as the neighbour leaves room.
    """
    edge, gap = right, 0.015 * right
    for centre, colour, label in reversed(notes):
        style = {"size": 8.5, "ha": "left", "va": "top"}
        square = axes.text(0, y + 0.31, "■ ", color=colour, **style)
        text = axes.text(0, y + 0.31, label, color=fig.FAINT, **style)
        boxes = [
            t.get_window_extent().transformed(axes.transData.inverted()) for t in (square, text)
        ]
        mark, words = (abs(box.x1 - box.x0) for box in boxes)
        start = max(min(centre - (mark + words) / 2, edge - mark - words), 0.0)
        square.set_x(start)
        text.set_x(start + mark)
        edge = start - gap


def _listed(small: Mapping[str, float]) -> str:
    """The three largest of the small parts by name, the others summed."""
    largest = sorted(small.keys() - {"other"}, key=lambda name: -small[name])[:3]
    text = ", ".join(f"{_NAMES[name]} {number(small[name])}" for name in largest)
    others = sum(ms for name, ms in small.items() if name not in largest)
    return f"rest: {text}" + (f", others {number(others)}" if others else "") + " ms"


def _lane_label(name: str, parts: Mapping[str, float]) -> str:
    if name in (CRITICAL, ALL):
        return name
    busy = 1 - parts.get(IDLE, 0.0) / sum(parts.values())
    return f"{fig.stream_name(name)}\n{busy:.0%} busy".replace("%", " %")


def _by_block(events) -> dict[str, float]:
    totals = dict.fromkeys(BLOCKS, 0.0)
    for event in events:
        totals[block_of(event.scope)] += event.duration_s * 1e3
    return {block: ms for block, ms in totals.items() if ms > 0}


def _remainder(name: str, step_ms: float, parts: Mapping[str, float]) -> dict[str, float]:
    """What is left of the step; nothing if it is rounding error or the parts exceed the step."""
    left = step_ms - sum(parts.values())
    return {name: left} if left > 1e-4 * step_ms else {}
