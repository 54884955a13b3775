"""What a timeline says of a run: FLOP, bytes and seconds, as numbers, as text and as a picture."""

import json
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.cost import price
from cmjax.cost.describe import amount, html, seconds
from cmjax.hardware import load_machine
from cmjax.program import trace

M = load_machine("cloudmatrix384")
ROWS, WIDE, LAYERS = 512, 1024, 7


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


(rows,) = jax.export.symbolic_shape("rows")


def model(x, ws):
    def layer(x, w):
        with jax.named_scope("product"):
            x = x @ w
        with jax.named_scope("activation"):
            return jnp.tanh(x), None

    with jax.named_scope("layers"):
        x = lax.scan(layer, x, ws)[0]
    with jax.named_scope("head"):
        return x @ ws[0]


PROGRAM = trace(model, array(rows, WIDE), array(LAYERS, WIDE, WIDE))


@pytest.fixture(scope="module")
def timeline():
    with jax.enable_x64(True):
        return price(PROGRAM, M, {"rows": float(ROWS)})


def test_flop_and_bytes_are_the_programs_totals(timeline):
    totals = PROGRAM.totals({"rows": float(ROWS)})
    assert float(timeline.flops) == totals["flops"] == (LAYERS + 1) * 2 * ROWS * WIDE**2
    assert float(timeline.hbm_bytes) == totals["read_bytes"] + totals["write_bytes"]
    assert set(timeline.link_bytes) == {"die", "node", "supernode"}


def test_scopes_add_up_to_the_totals(timeline):
    product = LAYERS * 2 * ROWS * WIDE**2
    assert float(timeline.scope_flops["layers/product"]) == product
    assert float(timeline.scope_flops["layers/activation"]) == 0
    for scopes, total in (
        (timeline.scope_flops, timeline.flops),
        (timeline.scope_hbm_bytes, timeline.hbm_bytes),
        (timeline.scopes, timeline.total_s),
    ):
        assert set(scopes) >= {"layers/product", "layers/activation", "head"}
        assert sum(map(float, scopes.values())) == pytest.approx(float(total), rel=1e-12)


def test_engines_are_busy_for_the_work_of_all_iterations(timeline):
    peak = M.chip.cube_flops_16bit * M.efficiency.gemm
    assert float(timeline.engines["cube"]) == pytest.approx(float(timeline.flops) / peak, rel=1e-9)
    rate = M.chip.hbm_bytes_per_s * M.efficiency.hbm
    assert float(timeline.engines["hbm"]) == pytest.approx(
        float(timeline.hbm_bytes) / rate, rel=1e-9
    )


def test_a_dictionary_is_json_and_holds_every_number(timeline):
    said = json.loads(json.dumps(timeline.to_dict()))
    assert list(said)[:3] == ["total_s", "flops", "hbm_bytes"]
    assert said["total_s"] == float(timeline.total_s)
    assert said["flops"] == float(timeline.flops)
    assert said["engines_s"] == {k: float(v) for k, v in timeline.engines.items()}
    head = said["scopes"]["head"]
    assert head["flops"] == 2 * ROWS * WIDE**2
    assert head["seconds"] == float(timeline.scopes["head"])
    (loop,) = said["loops"]
    assert (loop["scope"], loop["length"]) == ("layers", LAYERS)
    assert LAYERS * loop["each_s"] + head["seconds"] == pytest.approx(said["total_s"])


def test_a_batch_of_timelines_is_each_of_them():
    loads = jnp.array([100.0, 512.0, 9000.0])
    many = jax.vmap(lambda n: price(PROGRAM, M, {"rows": n}))(loads)
    said = many.to_dict()
    for i, load in enumerate(loads):
        one = price(PROGRAM, M, {"rows": load}).to_dict()
        assert said["total_s"][i] == pytest.approx(one["total_s"], rel=1e-12)
        assert said["flops"][i] == pytest.approx(one["flops"], rel=1e-12)
        for engine, busy in one["engines_s"].items():
            assert said["engines_s"][engine][i] == pytest.approx(busy, rel=1e-12)
        assert said["scopes"]["head"]["seconds"][i] == pytest.approx(
            one["scopes"]["head"]["seconds"], rel=1e-12
        )
        assert said["loops"][0]["each_s"][i] == pytest.approx(one["loops"][0]["each_s"], rel=1e-12)
    assert repr(many) == "Timeline(4 operations, batch (3,))"


def test_a_line_says_time_flop_bytes_and_the_busiest_engine(timeline):
    text = repr(timeline)
    assert text.startswith(f"Timeline({seconds(float(timeline.total_s))}, 8.59 GFLOP, ")
    assert "of HBM traffic" in text
    busiest = max(timeline.engines, key=lambda name: float(timeline.engines[name]))
    share = float(timeline.engines[busiest]) / float(timeline.total_s)
    assert text.endswith(f"busy {share:.0%}".replace("%", " %") + ")")


def test_a_line_says_what_is_sent():
    program = trace(lambda x: lax.psum(x, "npu"), array(1024, 1024), axis_sizes={"npu": 8})
    assert "3.67 MB sent" in repr(price(program, M, {}))


def test_a_timeline_that_is_traced_or_empty_has_a_line_too():
    seen = []

    def total(n):
        timeline = price(PROGRAM, M, {"rows": n})
        seen.append((repr(timeline), timeline._repr_html_()))
        return timeline.total_s

    jax.grad(total)(512.0)
    line = "Timeline(4 operations, traced)"
    assert seen == [(line, f"<pre>{line}</pre>")]
    empty = price(trace(lambda x: x, array(4)), M, {})
    assert repr(empty) == "Timeline(0 ns, 0 FLOP, 0 B of HBM traffic)"
    axes = jax.tree.map(lambda _: 0, empty)
    assert repr(axes) == "Timeline(0)"


class Cells(HTMLParser):
    """Texts of a page's table cells, and tags that are left open."""

    def __init__(self):
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_a_notebook_shows_scopes_and_engines_in_tables(timeline):
    page = Cells()
    page.feed(timeline._repr_html_())
    assert page.open == []
    head = page.cells.index("head")
    share = float(timeline.scopes["head"]) / float(timeline.total_s)
    assert page.cells[head : head + 5] == [
        "head",
        "1.07 GFLOP",
        f"{amount(float(timeline.scope_hbm_bytes['head']))}B",
        seconds(float(timeline.scopes["head"])),
        f"{share:.1%}".replace("%", " %"),
    ]
    assert {"cube", "vector", "HBM", "fabric"} <= set(page.cells)


def test_names_in_a_picture_are_escaped(timeline):
    said = timeline.to_dict()
    said["scopes"] = {"<b>head</b>": said["scopes"]["head"]}
    page = Cells()
    page.feed(html(said))
    assert "<b>head</b>" in page.cells and page.open == []


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0 "), (999.0, "999 "), (1.5e3, "1.5 k"), (2.34567e12, "2.35 T"), (4e16, "40 P")],
)
def test_amounts_have_three_digits_and_a_prefix(value, text):
    assert amount(value) == text


@pytest.mark.parametrize(
    "value, text", [(2.0, "2 s"), (1.5e-3, "1.5 ms"), (4.25e-6, "4.25 µs"), (3e-9, "3 ns")]
)
def test_times_have_the_unit_that_suits_them(value, text):
    assert seconds(value) == text


def test_a_trace_file_replaces_an_older_one_whole(tmp_path, timeline):
    path = tmp_path / "trace.json"
    path.write_text("old" * 10_000)
    timeline.to_perfetto(path)
    events = json.loads(path.read_text())["traceEvents"]
    assert len([e for e in events if e["ph"] == "X"]) == 2 * LAYERS + 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_loads_own_iterations_show_in_the_events():
    load = np.array([100.0, 200.0, 400.0, 800.0, 1600.0, 3200.0, 6400.0])
    events = price(PROGRAM, M, {"rows": load}).events()
    durations = [e.duration_s for e in events if e.scope == "layers/product"]
    assert durations == sorted(durations) and durations[-1] > 2 * durations[0]
    assert [e.iteration for e in events if e.scope == "layers/product"] == [
        (i,) for i in range(LAYERS)
    ]
