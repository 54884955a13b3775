"""One layer in steady state, as a Gantt chart: streams as lanes, microbatches as colours."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cmjax.cost.replay import Event
from cmjax.cost.timeline import Timeline
from cmjax.program import Program
from cmjax.report.blocks import BLOCKS, block_of
from cmjax.report.figure_path import checked_path
from cmjax.report.plots import figure as fig
from cmjax.report.units import number, percent

_COLOURS = (fig.SKY, fig.ORANGE, fig.GREEN, fig.PURPLE)
_HEIGHT = 0.68  # of a lane
_INVISIBLE = 1e-4  # of the period: shorter operations are left out
_ALWAYS = 0.995  # of the period: a stream that works so much of it is what sets it
_KERNELS = {"dot_general": "GEMM", "add": "add", "concatenate": "concat"}


@dataclass(frozen=True)
class Bar:
    """An operation inside the period: microseconds from its start, and which microbatch it is of.

    Attributes:
      clipped: whether part of the operation lies outside the period.
    """

    name: str
    block: str
    stream: str
    microbatch: int
    start_us: float
    duration_us: float
    clipped: bool


@dataclass(frozen=True)
class Period:
    """One iteration of the longest loop in steady state.

    Attributes:
      layer: which iteration it is, from 0; layers: how many the loop has.
      span_us: from its first operation's start to the next iteration's.
    """

    layer: int
    layers: int
    span_us: float
    bars: tuple[Bar, ...]

    def busy(self, stream: str) -> float:
        """Fraction of the period in which `stream` works."""
        return sum(b.duration_us for b in self.bars if b.stream == stream) / self.span_us


def layer_period(timeline: Timeline, layer: int | None = None) -> Period:
    """Cut one iteration of the longest loop out of a timeline.

    What other iterations do meanwhile is part of the picture: streams run ahead of each other.

    Args:
      timeline: one configuration, not batched.
      layer: iteration to show, from 0; the middle one if `None`.
    Raises: ValueError: the program has no loop of three or more iterations, or not that layer.
    """
    loops = [op.loop for level, _ in timeline.program.levels for op in level.operations if op.loop]
    loop = max(loops, key=lambda loop: loop.length, default=None)
    if loop is None or loop.length < 3:
        raise ValueError("plot_timeline: the program has no loop of three or more iterations")
    layer = loop.length // 2 if layer is None else layer
    if not 0 <= layer < loop.length - 1:
        raise ValueError(
            f"plot_timeline: layer must lie in 0..{loop.length - 2} (the last one has no "
            f"successor to overlap with), got {layer}"
        )
    chains = zip(microbatch_of(loop.body), loop.body.operations, strict=True)
    microbatches = [chain for chain, op in chains if op.loop is None]
    runs = _iterations(timeline, loop.body)
    begin, end = (min(e.start_s for e in runs[n]) for n in (layer, layer + 1))
    bars = []
    for events in runs.values():
        for event, microbatch in zip(events, microbatches, strict=True):
            start, stop = event.start_s, event.start_s + event.duration_s
            inside = min(stop, end) - max(start, begin)
            if inside <= _INVISIBLE * (end - begin):
                continue
            bars.append(
                Bar(
                    event.name,
                    block_of(event.scope),
                    event.stream,
                    microbatch,
                    (max(start, begin) - begin) * 1e6,
                    inside * 1e6,
                    inside < (stop - start) * (1 - 1e-6),
                )
            )
    return Period(layer, loop.length, (end - begin) * 1e6, tuple(bars))


def microbatch_of(body: Program) -> list[int]:
    """Which independent chain of a loop's body each operation belongs to, in order of issue.

    Two operations are of one chain if one feeds the other, directly or through others.
    """
    chain = list(range(len(body.operations)))

    def root(i: int) -> int:
        while chain[i] != i:
            i = chain[i]
        return i

    for i, op in enumerate(body.operations):
        for source in op.sources:
            if source.op is not None:
                first, second = sorted((root(i), root(source.op)))
                chain[second] = first
    roots = [root(i) for i in range(len(chain))]
    large = sorted(r for r in set(roots) if roots.count(r) > 1) or sorted(set(roots))
    return [large.index(r) if r in large else 0 for r in roots]


def timeline_title(period: Period) -> str:
    """The finding: which stream sets the layer's time, and how busy the others are."""
    streams = sorted({b.stream for b in period.bars}, key=lambda s: -period.busy(s))
    ms = period.span_us / 1e3
    takes = f"{number(ms)} ms" if ms >= 10 else f"{ms * 1e3:,.0f} µs"
    busy = [f"{fig.stream_name(s)} {percent(period.busy(s), digits=0)} busy" for s in streams]
    if len(streams) == 1 or period.busy(streams[0]) < _ALWAYS:
        return f"One layer takes {takes}: {', '.join(busy)}"
    return f"The {fig.stream_name(streams[0])} sets the layer's {takes}; {', '.join(busy[1:])}"


@fig.plain_text
def plot_timeline(timeline: Timeline, path: str | Path, layer: int | None = None) -> None:
    """Draw one layer's period, kernels labelled where the text fits; arguments as `layer_period`.

    Raises: ValueError for a path that cannot be written, or as `layer_period`.
    """
    checked_path(path)
    period = layer_period(timeline, layer)
    streams = [s for s in timeline.program.streams if any(b.stream == s for b in period.bars)]
    figure = fig.new_figure(1.55 + 1.3 * len(streams))
    fig.set_title(figure, timeline_title(period))
    labels = [_lane_label(timeline, s) for s in streams]
    axes = fig.add_axes(figure, left=fig.widest_inches(figure, labels, 10) + 0.2, top=0.85)
    axes.set(xlim=(0, period.span_us), ylim=(len(streams) - 0.4, -0.35))
    axes.set_xlabel(f"time in layer {period.layer + 1} of {period.layers} (µs)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_yticks(range(len(streams)), labels)
    fig.quiet_axes(axes, keep=("bottom",))
    axes.tick_params(axis="y", length=0, labelcolor=fig.INK, labelsize=10)
    for bar in period.bars:
        _draw_kernel(axes, streams.index(bar.stream), bar)
    for stream in streams:
        _draw_blocks(axes, streams.index(stream), [b for b in period.bars if b.stream == stream])
    _write_key(figure, sorted({b.microbatch for b in period.bars}))
    fig.save(figure, path)


def kernel_name(name: str) -> str:
    """A kernel's name without the program's prefixes; fused element-wise chains are one word."""
    name = name.removeprefix("cm_")
    return _KERNELS.get(name, "element-wise" if "+" in name else name.replace("_", " "))


def _draw_kernel(axes, lane: int, bar: Bar) -> None:
    colour = _COLOURS[bar.microbatch % len(_COLOURS)]
    box = (bar.duration_us, _HEIGHT)
    axes.barh(
        lane, box[0], left=bar.start_us, height=_HEIGHT, color=colour, edgecolor="white", lw=0.6
    )
    name = kernel_name(bar.name)
    split = re.sub(r" |(?<=[a-z])(?=[A-Z])", "\n", name)
    value = "" if bar.clipped else f"\n{number(bar.duration_us)}"
    place = (bar.start_us + bar.duration_us / 2, lane, *box)
    style = {"size": 8.5, "color": fig.INK, "linespacing": 1.05}
    if not fig.first_label_that_fits(axes, *place, [name + value, split + value], **style):
        fig.first_label_that_fits(
            axes, *place, [name + value, split + value, name, split], rotation=90, **style
        )


def _draw_blocks(axes, lane: int, bars: list[Bar]) -> None:
    """Under the kernels, a thin line and a name for each run of one block."""
    runs: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda b: b.start_us):
        last = runs[-1][-1] if runs else None
        if last and _adjoin(last, bar):
            runs[-1].append(bar)
        else:
            runs.append([bar])
    for run in runs:
        left, right = run[0].start_us, run[-1].start_us + run[-1].duration_us
        gap = min(0.0025 * axes.get_xlim()[1], (right - left) / 4)
        axes.plot([left + gap, right - gap], [lane + 0.39] * 2, color=fig.FAINT, lw=1.5)
        name = BLOCKS[run[0].block]
        fig.first_label_that_fits(
            axes, (left + right) / 2, lane + 0.48, right - left, 0.3, [name],
            size=9, color=fig.FAINT,
        )  # fmt: skip


def _adjoin(one: Bar, two: Bar) -> bool:
    """Whether two bars are of one block and microbatch, with no more than a short gap between."""
    gap = two.start_us - (one.start_us + one.duration_us)
    same = (one.block, one.microbatch) == (two.block, two.microbatch)
    return same and gap <= 0.1 * (one.duration_us + two.duration_us)


def _write_key(figure, microbatches: list[int]) -> None:
    """What the colours mean, in the line under the title, each in its colour's box."""
    height = figure.get_figheight()
    x = 0.12 / fig.WIDTH_INCHES
    place = {"y": 1 - 0.43 / height, "va": "top", "size": 9}
    for microbatch in microbatches if len(microbatches) > 1 else []:
        box = {"facecolor": _COLOURS[microbatch % len(_COLOURS)], "edgecolor": "none", "pad": 2.5}
        figure.text(x + 0.005, s=f"microbatch {microbatch + 1}", color=fig.INK, bbox=box, **place)
        x += 0.135
    figure.text(x, s="numbers: µs", color=fig.FAINT, **place)


def _lane_label(timeline: Timeline, name: str) -> str:
    """The stream and the share of the die's cores it owns, where it owns a share."""
    operations = (op for level, _ in timeline.program.levels for op in level.operations)
    stream = next(op.stream for op in operations if op.stream.name == name)
    cores = [
        f"{count} {kind}"
        for count, kind in ((stream.cube_cores, "cube"), (stream.vector_cores, "vector"))
        if count is not None
    ]
    return fig.stream_name(name) + (f"\n{' + '.join(cores)}\ncores" if cores else "")


def _iterations(timeline: Timeline, body: Program) -> dict[int, list[Event]]:
    """Events of one loop by iteration."""
    found: dict[int, list[Event]] = {}
    owners = _owners(timeline.program, 0)
    for event, (owner, iteration) in zip(timeline.events(), owners, strict=True):
        if owner is body:
            found.setdefault(iteration, []).append(event)
    return found


def _owners(level: Program, iteration: int) -> Iterator[tuple[Program, int]]:
    """Level and iteration of every event, in order of issue."""
    for op in level.operations:
        if op.loop is None:
            yield level, iteration
        else:
            for n in range(op.loop.length):
                yield from _owners(op.loop.body, n)
