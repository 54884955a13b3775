"""Figures: what they say is computed from the data, and the files can be read back."""

import dataclasses
import itertools
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from cmjax.deploy.validation import ValidationRow
from cmjax.report import (
    ThroughputPoint,
    plot_load_curve,
    plot_node_bytes,
    plot_placement,
    plot_rank_curve,
    plot_step,
    plot_steps_compare,
    plot_throughput,
    plot_timeline,
    roll_up,
)
from cmjax.report.plots import (
    layer_period,
    load_curve_title,
    node_bytes_title,
    placement_title,
    rank_curve_title,
    step_lanes,
    step_title,
    steps_compare_title,
    throughput_title,
    timeline_title,
)
from cmjax.report.plots.throughput import best_within
from cmjax.report.units import number

POINTS = [
    ThroughputPoint(batch, 20 + batch / 4, 1e3 * batch / (20 + batch / 4))
    for batch in (8, 16, 32, 64, 96)
]
ROWS = [
    ValidationRow("TPOT", "predict", 46.6, 49.4, "paper", "tpot_ms"),
    ValidationRow("throughput", "predict", 2061, 1943, "paper", "tokens_per_s_per_npu"),
    ValidationRow("GEMM", "calibrate", 0.8, 0.774, "paper", "utilization"),
]
LOADS = {"contiguous": np.array([[4.0, 0, 2, 2], [3, 1, 2, 2]]), "greedy": np.full((2, 4), 2.0)}
RECEIVED = {"contiguous": np.array([2.4e9, 0.6e9]), "greedy": np.array([1.5e9, 1.5e9])}
PNG = b"\x89PNG\r\n\x1a\n"
PLOTS = {
    "step": lambda path, result, timeline: plot_step(result, path, timeline),
    "step without timeline": lambda path, result, timeline: plot_step(result, path),
    "timeline": lambda path, result, timeline: plot_timeline(timeline, path),
    "steps compare": lambda path, result, timeline: plot_steps_compare(ROWS, path),
    "throughput": lambda path, result, timeline: plot_throughput(POINTS, path, slo_ms=(30, 50)),
    "placement": lambda path, result, timeline: plot_placement(LOADS, path),
    "load curve": lambda path, result, timeline: plot_load_curve(LOADS["contiguous"], path),
    "rank curve": lambda path, result, timeline: plot_rank_curve(LOADS, path),
    "node bytes": lambda path, result, timeline: plot_node_bytes(RECEIVED, path),
}
TITLES = {
    "step": lambda result, timeline: step_title(result, timeline),
    "step without timeline": lambda result, timeline: step_title(result),
    "timeline": lambda result, timeline: timeline_title(layer_period(timeline)),
    "steps compare": lambda result, timeline: steps_compare_title(ROWS),
    "throughput": lambda result, timeline: throughput_title(POINTS, (30, 50)),
    "placement": lambda result, timeline: placement_title(LOADS),
    "load curve": lambda result, timeline: load_curve_title(LOADS["contiguous"]),
    "rank curve": lambda result, timeline: rank_curve_title(LOADS),
    "node bytes": lambda result, timeline: node_bytes_title(RECEIVED),
}


@pytest.mark.parametrize("name", PLOTS)
def test_every_figure_is_written_as_png_and_as_svg_with_its_title(name, tmp_path, result, timeline):
    before = dict(matplotlib.rcParams)
    for suffix in (".png", ".svg"):
        PLOTS[name](tmp_path / f"figure{suffix}", result, timeline)
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    svg = (tmp_path / "figure.svg").read_text()
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert f"<!-- {TITLES[name](result, timeline)} -->" in svg
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_data_give_the_same_bytes(suffix, tmp_path):
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    plot_throughput(POINTS, one, slo_ms=(30,))
    plot_throughput(POINTS, two, slo_ms=(30,))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize(
    "file, message",
    [
        ("figure.pdf", "written as .png or .svg, got '.pdf'"),
        ("figure", "written as .png or .svg, got no suffix"),
        ("missing/figure.png", "missing does not exist"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(name, file, message, tmp_path, result, timeline):
    with pytest.raises(ValueError, match=message):
        PLOTS[name](tmp_path / file, result, timeline)
    assert not list(tmp_path.iterdir())


def test_a_name_is_no_formula(tmp_path, recwarn):
    loads = next(iter(LOADS.values()))
    for suffix in ("svg", "png"):
        plot_placement({"$\\frac$": loads, "漢 $x_{$": loads}, tmp_path / f"a.{suffix}")
    assert not recwarn


def test_every_lane_of_the_step_adds_up_to_the_step(result, timeline):
    lanes = step_lanes(result, timeline)
    assert list(lanes)[:3] == ["critical path", "attention", "moe"]
    for parts in lanes.values():
        assert sum(parts.values()) == pytest.approx(result["step_ms"], rel=1e-4)
        assert min(parts.values()) > 0
    assert lanes["critical path"]["host"] == pytest.approx(0.5, rel=1e-3)


def test_streams_hold_the_time_of_their_blocks(result, timeline):
    lanes, blocks = step_lanes(result, timeline), roll_up(result["breakdown"])
    assert lanes["attention"]["attention"] == pytest.approx(blocks["attention"], rel=1e-4)
    assert lanes["moe"]["experts"] == pytest.approx(blocks["experts"], rel=1e-4)


def test_without_a_timeline_the_one_lane_holds_all_work(result):
    (parts,) = step_lanes(result).values()
    assert sum(parts.values()) == pytest.approx(
        max(result["step_ms"], sum(result["breakdown"].values()))
    )
    quick = result | {"breakdown": {"attention/core": 0.25 * result["step_ms"]}}
    (parts,) = step_lanes(quick).values()
    assert parts["idle"] == pytest.approx(0.75 * result["step_ms"])


def test_the_step_title_names_the_block_that_sets_it(result, timeline):
    step, token = number(result["step_ms"]), number(result["tpot_ms"])
    assert step_title(result, timeline) == (
        f"Attention sets the decode step: {step} ms, {token} ms per token"
    )
    prefill = {k: v for k, v in result.items() if k != "tpot_ms"}
    assert step_title(prefill) == f"Attention is the largest part of the prefill step: {step} ms"
    experts = prefill | {"breakdown": {"experts": result["step_ms"]}}
    assert step_title(experts) == f"Experts are the largest part of the prefill step: {step} ms"
    thirds = {name: 0.3 * result["step_ms"] for name in ("dispatch", "combine", "experts")}
    assert step_title(prefill | {"breakdown": thirds}) == (
        f"Dispatch and combine are the largest part of the prefill step: {step} ms"
    )


def test_a_layer_period_is_one_iteration_in_steady_state(timeline):
    period = layer_period(timeline)
    (loop,) = timeline.loops
    assert (period.layer, period.layers) == (2, loop.length)
    busy = loop.streams_s
    assert period.span_us == pytest.approx(float(busy["attention"]) * 1e6, rel=1e-3)
    for stream, seconds in busy.items():
        assert period.busy(stream) * period.span_us == pytest.approx(float(seconds) * 1e6, rel=1e-3)
        assert {b.microbatch for b in period.bars if b.stream == stream} == {0, 1}
    assert {b.block for b in period.bars} == {"attention", "experts"}
    assert re.fullmatch(
        r"The attention stream sets the layer's [\d,]+ µs; MoE stream \d+ % busy",
        timeline_title(period),
    )
    assert all(b.start_us + b.duration_us <= period.span_us * (1 + 1e-6) for b in period.bars)


def test_bars_of_one_stream_never_overlap(timeline):
    bars = sorted(layer_period(timeline, 1).bars, key=lambda b: (b.stream, b.start_us))
    for one, two in itertools.pairwise(bars):
        if one.stream == two.stream:
            assert one.start_us + one.duration_us <= two.start_us + 1e-3


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_a_layer_without_a_successor_is_refused(layer, timeline, tmp_path):
    with pytest.raises(ValueError, match=rf"layer must lie in 0\.\.3 .* got {layer}"):
        plot_timeline(timeline, tmp_path / "figure.png", layer)


def test_titles_are_computed_from_the_data():
    assert (
        steps_compare_title(ROWS)
        == "End-to-end predictions are 5.9 % off on average, 6.1 % at worst"
    )
    assert steps_compare_title(ROWS[:1]) == "End-to-end predictions vs published: 5.7 % off"
    assert steps_compare_title(ROWS[2:]) == "Calibrated kernels vs published: 3.4 % off"
    assert placement_title(LOADS) == "Busiest rank over mean: contiguous 1.75×, greedy 1.00×"
    assert load_curve_title(LOADS["contiguous"]) == (
        "The busiest 1 of 4 experts take 44 % of the tokens; the busiest, 1.8× the mean"
    )


def test_the_throughput_title_gives_the_best_batch_under_the_slo():
    assert best_within(POINTS, 40) == POINTS[3]
    assert throughput_title(POINTS, (40, 30)) == (
        "Within 40 ms per token: 1,778 tokens/s per NPU at batch 64"
    )
    full = [dataclasses.replace(p, fits_hbm=p.batch < 64) for p in POINTS]
    assert "at batch 32" in throughput_title(full, (40,))
    assert throughput_title(POINTS, (5,)).startswith("No batch meets the SLO; the most is 2,182")
    none = [dataclasses.replace(p, fits_hbm=False) for p in POINTS]
    assert throughput_title(none) == "No batch fits the memory of a die"


def test_a_point_is_read_from_a_decode_result_only(result):
    assert ThroughputPoint.of(result).batch == 96
    with pytest.raises(ValueError, match="expected a decode result"):
        ThroughputPoint.of({"ttft_ms": 1.0})


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda path: plot_throughput([], path), "no points"),
        (lambda path: plot_steps_compare([], path), "no rows"),
        (lambda path: plot_placement({}, path), "no placements"),
        (lambda path: plot_placement({"a": np.ones(4)}, path), r"got shape \(4,\)"),
        (lambda path: plot_placement({"a": -np.ones((2, 2))}, path), "finite loads of 0 or more"),
        (lambda path: plot_load_curve(np.array([[1.0, 2], [0, 0]]), path), "a layer of zeros"),
        (lambda path: plot_load_curve(np.array([[1.0, np.nan]]), path), "finite loads"),
        (lambda path: plot_rank_curve({}, path), "no placements"),
        (lambda path: plot_node_bytes({}, path), "at least one placement"),
        (lambda path: plot_node_bytes({"a": np.array([1.0, -1])}, path), "0 or more, .* for a"),
        (
            lambda path: plot_node_bytes({"a": np.ones(2), "b": np.ones(3)}, path),
            r"same nodes for all, got shapes \[\(2,\), \(3,\)\]",
        ),
    ],
)
def test_data_that_cannot_be_drawn_is_refused(draw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "figure.png")


def test_the_rank_curve_names_the_worst_layer_and_the_bytes_the_busiest_node():
    assert rank_curve_title(LOADS) == (
        "Busiest rank of the worst layer: contiguous 2.00×, greedy 1.00×"
    )
    assert node_bytes_title(RECEIVED) == (
        "Busiest node receives a step, in GB: contiguous 2.40, greedy 1.50"
    )
    assert "in kB: a 3.00" in node_bytes_title({"a": np.array([3e3, 2e3])})


def test_many_curves_take_more_rows(tmp_path):
    heights = []
    for count in (4, 5):
        path = tmp_path / f"{count}.svg"
        plot_rank_curve({f"m{n}": LOADS["contiguous"] for n in range(count)}, path)
        heights.append(float(ElementTree.fromstring(path.read_text()).attrib["height"][:-2]))
    assert heights[1] > 1.5 * heights[0]
