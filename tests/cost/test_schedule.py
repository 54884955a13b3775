"""The max-plus schedule against a replay of events, and what a timeline says."""

import contextlib
import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.cost import price
from cmjax.hardware import load_machine, replace_leaf
from cmjax.program import ahead, stream, trace

M = load_machine("cloudmatrix384")
BF16 = jnp.bfloat16
STREAMS = (("left", 16, 32), ("right", 8, 16), None)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def array(*shape):
    return jax.ShapeDtypeStruct(shape, BF16)


X, W = array(512, 1024), array(1024, 1024)


def on(where, fn, *args):
    if where is None:
        return fn(*args)
    name, cube, vector = where
    with stream(name, cube=cube, vector=vector):
        return fn(*args)


def product(x, w):
    return x @ w


def work(weight):
    """A kernel chain of `weight` matrix products."""

    def chain(x, w):
        for _ in range(weight):
            x = x @ w
        return x

    return chain


def random_program(seed: int):
    """A function of random kernels on random streams, some of them issued ahead, with scans of 1 to
    7 iterations, nested."""
    rng = np.random.default_rng(seed)

    def block(values, w, depth):
        values = list(values)
        for _ in range(rng.integers(2, 6)):
            i, j = rng.integers(len(values), size=2)
            where = STREAMS[rng.integers(len(STREAMS))]
            match rng.integers(5 if depth else 4):
                case 0 | 1:
                    with ahead() if rng.integers(2) else contextlib.nullcontext():
                        values[i] = on(where, work(rng.integers(1, 4)), values[j], w)
                case 2:
                    values[i] = on(where, lambda x: jnp.exp(jnp.exp(x)), values[j])
                case 3:
                    values[i] = on(where, lambda x, y: x + y, values[i], values[j])
                case 4:
                    values = scan(values, w, depth - 1)
        return values

    def scan(values, w, depth):
        length = int(rng.integers(1, 8))
        body = functools.partial(block, w=w, depth=depth)

        def step(carry, _):
            carry = body(carry)
            return tuple(carry), jnp.sum(carry[0], axis=0)

        values, each = lax.scan(step, tuple(values), length=length)
        return [*values[:-1], values[-1] + jnp.sum(each, axis=0)]

    def program(x, y, w):
        return block(scan(block([x, y, x], w, 0), w, 1), w, 1)

    return trace(program, X, X, W)


@functools.cache
def priced(seed):
    program = random_program(seed)
    with jax.enable_x64(True):
        return price(program, M, {})


def end_of(events):
    return max(e.start_s + e.duration_s for e in events)


@pytest.mark.parametrize("seed", range(14))
def test_the_longest_path_is_the_end_of_an_event_by_event_replay(seed):
    timeline = priced(seed)
    events = timeline.events()
    assert end_of(events) == pytest.approx(float(timeline.total_s), rel=1e-10)
    counted = sum(
        times * sum(op.loop is None for op in level.operations)
        for level, times in timeline.program.levels
    )
    assert len(events) == counted


@pytest.mark.parametrize("seed", range(0, 14, 3))
def test_a_replay_respects_streams_and_dependencies(seed):
    events = priced(seed).events()
    free = {}
    for event in events:
        assert event.start_s >= free.get(event.stream, 0.0)
        free[event.stream] = event.start_s + event.duration_s
        before = 0.0 if event.after is None else end_of([events[event.after]])
        assert event.start_s == before


@pytest.mark.parametrize("seed", range(0, 14, 3))
def test_a_critical_path_without_gaps_sums_to_the_total(seed):
    timeline = priced(seed)
    path = timeline.critical_path()
    for earlier, later in itertools.pairwise(path):
        assert later.start_s == earlier.start_s + earlier.duration_s
    assert sum(e.duration_s for e in path) == pytest.approx(float(timeline.total_s), rel=1e-10)


def test_the_bound_from_busy_streams_holds():
    for seed in range(14):
        timeline = priced(seed)
        busy = {}
        for event in timeline.events():
            busy[event.stream] = busy.get(event.stream, 0.0) + event.duration_s
        total = float(timeline.total_s)
        assert max(busy.values()) <= total * (1 + 1e-10) <= sum(busy.values()) * (1 + 2e-10)


def microbatched(streams, dependent=False):
    """Two microbatches, each through both stages of every layer."""
    (left, right) = streams

    def layer(carry, _):
        a, b, w = carry
        a = on(left, product, a, w)
        b = on(left, product, a if dependent else b, w)
        a = on(right, product, b if dependent else a, w)
        b = on(right, product, a if dependent else b, w)
        return (b if dependent else a, b, w), None

    def model(a, b, w, *, layers):
        return lax.scan(layer, (a, b, w), length=layers)[0][:2]

    return model


def seconds_per_layer(model, machine=M):
    def total(layers):
        fn = functools.partial(model, layers=layers)
        return float(
            price(
                trace(fn, array(512, 4096), array(512, 4096), array(4096, 4096)), machine, {}
            ).total_s
        )

    return (total(61) - total(21)) / 40


def test_two_microbatches_over_two_streams_take_the_longer_streams_time():
    quiet = _without_contention(M)
    one = lambda where: seconds_per_layer(microbatched((where, where)), quiet) / 4  # noqa: E731
    left, right = one(("left", 16, 32)), one(("right", 8, 16))
    assert right > 1.5 * left
    got = seconds_per_layer(microbatched((("left", 16, 32), ("right", 8, 16))), quiet)
    assert got == pytest.approx(2 * max(left, right), rel=1e-9)


def test_a_dependent_chain_does_not_overlap():
    quiet = _without_contention(M)
    left, right = ("left", 16, 32), ("right", 8, 16)
    one = {s: seconds_per_layer(microbatched((s, s)), quiet) / 4 for s in (left, right)}
    got = seconds_per_layer(microbatched((left, right), dependent=True), quiet)
    assert got == pytest.approx(2 * one[left] + 2 * one[right], rel=1e-9)


def _without_contention(machine):
    """HBM so fast that the streams do not meet there."""
    return replace_leaf(machine, "chip.hbm_bytes_per_s", 1e18)


@pytest.mark.parametrize("name", ["h800-pod", "cloudmatrix384"])
def test_beside_exchanges_that_hold_cores_products_run_on_the_others_throughout(name):
    machine = _without_contention(load_machine(name))
    comm, compute = ("exchange", None, None), ("compute", None, None)
    rows, n = 1 << 19, 1 << 14

    def step(sent, x, w):
        move = lambda sent: lax.all_to_all(sent, "node", 0, 0, tiled=True)  # noqa: E731
        return on(comm, move, sent), on(compute, jnp.matmul, x, w)

    def seconds(rows):
        program = trace(step, array(rows, 64), array(n, n), array(n, n), axis_sizes={"node": 4})
        timeline = price(program, machine, {})
        return {op.stream.name: float(t) for op, t in zip(
            timeline.program.operations, timeline.parts[0].total, strict=True
        )}  # fmt: skip

    # three quarters of what is sent arrive, of which half does not fit L2 twice
    some = 4 * round(machine.chip.l2_bytes / (64 * 2) / 4)
    small, half, large = seconds(4 * 64), seconds(some), seconds(rows)
    assert small["exchange"] < large["exchange"] < 0.5 * large["compute"]
    slow = large["compute"] / small["compute"]
    throughout = 1 + machine.exchange.interference
    if machine.exchange.bulk_kernels:
        assert slow == pytest.approx(throughout, rel=1e-2)
        halfway = 1 + machine.exchange.interference / 2
        assert half["compute"] / small["compute"] == pytest.approx(halfway, rel=1e-2)
    else:
        assert 1 < slow < 1 + machine.exchange.interference / 2


def copies_on(left, right, layers):
    """Layers of one copy on each of two streams, and what a copy takes of HBM alone."""

    def copies(a, b):
        def layer(carry, _):
            a, b = carry
            return (on(left, jnp.negative, a), on(right, jnp.negative, b)), None

        return lax.scan(layer, (a, b), length=layers)[0]

    big = array(4096, 4096)
    alone = 2 * 4096 * 4096 * 2 / (M.chip.hbm_bytes_per_s * M.efficiency.hbm)
    return trace(copies, big, big), alone


def test_streams_that_do_nothing_but_read_hbm_take_what_they_take_one_after_another():
    left, right = ("left", 24, 48), ("right", 24, 48)
    at_once = replace_leaf(M, "chip.vector_startup_s", 0.0)
    program, alone = copies_on(left, right, 4)
    assert float(price(program, at_once, {}).total_s) == pytest.approx(4 * 2 * alone, rel=1e-6)


def test_a_kernel_never_gets_less_than_half_of_hbm():
    left, right = ("left", 12, 24), ("right", 12, 24)
    program, alone = copies_on(left, right, 4)
    both = float(price(program, M, {}).total_s)
    # launched apart, so that they do not meet all the time
    assert 4 * alone * 1.5 < both < 4 * (2 * alone + M.chip.vector_startup_s)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 61])
def test_depth_changes_the_time_and_not_the_program(length):
    def model(x, ws):
        return lax.scan(lambda x, w: (jnp.exp(x @ w), None), x, ws)[0]

    program = trace(model, X, array(length, 1024, 1024))
    assert sum(len(level.operations) for level, _ in program.levels) == 3
    once = price(trace(lambda x, w: jnp.exp(x @ w), X, W), M, {}).total_s
    assert float(price(program, M, {}).total_s) == pytest.approx(length * float(once), rel=1e-12)


def symbolic_layers(length):
    """Layers on two streams whose rows are a symbol, between kernels outside the loop."""
    (rows,) = jax.export.symbolic_shape("rows")

    def layer(carry, w):
        x, y = carry
        x = on(STREAMS[0], product, x, w)
        y = on(STREAMS[1], product, y, w) + on(STREAMS[1], jnp.exp, x)
        return (x, y), None

    def model(x, y, ws):
        x, y = lax.scan(layer, (jnp.exp(x), y), ws)[0]
        return x + y

    half = array(rows, 1024)
    return trace(model, half, half, array(length, 1024, 1024))


def test_a_load_per_layer_is_the_product_of_the_layers_own_prices():
    length = 5
    (rows,) = jax.export.symbolic_shape("rows")

    def model(x, ws):
        return lax.scan(lambda x, w: (jnp.exp(x @ w), None), x, ws)[0]

    deep = trace(model, array(rows, 1024), array(length, 1024, 1024))
    one = trace(model, array(rows, 1024), array(1, 1024, 1024))
    load = np.array([100.0, 5000.0, 300.0, 20000.0, 1.0])
    got = float(price(deep, M, {"rows": load}).total_s)
    want = sum(float(price(one, M, {"rows": r}).total_s) for r in load)
    assert got == pytest.approx(want, rel=1e-12)


def test_an_equal_load_per_layer_is_the_load_as_one_number():
    program = symbolic_layers(6)
    once = price(program, M, {"rows": 3000.0})
    each = price(program, M, {"rows": np.full(6, 3000.0)})
    # Streams are taken to disturb one another as in the mean layer, so only that differs.
    assert float(each.total_s) == pytest.approx(float(once.total_s), rel=0.1)
    assert end_of(each.events()) == pytest.approx(float(each.total_s), rel=1e-10)


def test_a_load_per_layer_changes_the_total_in_its_own_layer():
    program = symbolic_layers(4)

    def total(load):
        return price(program, M, {"rows": load}).total_s

    slopes = np.asarray(jax.grad(total)(jnp.array([5e3, 1e3, 2e4, 3e3])))
    assert (slopes > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 5, 9])
def test_a_smooth_price_is_an_upper_bound_that_converges(seed):
    program = random_program(seed)
    quiet = _without_contention(M)
    exact = float(price(program, quiet, {}).total_s)
    excess = [
        float(price(program, quiet, {}, temperature=10.0**-k).total_s) - exact for k in range(6, 12)
    ]
    assert all(e >= -1e-12 * exact for e in excess)
    assert all(later < earlier for earlier, later in itertools.pairwise(excess))
    assert excess[-1] < 1e-5 * exact
    # The error is linear in the temperature once maxima are told apart.
    assert excess[-1] <= 0.11 * excess[-2] + 1e-13


def test_a_smooth_price_has_gradients_in_all_that_compete():
    def both(x, w):
        return x @ w

    program = trace(both, X, W)

    def slope(temperature):
        total = lambda m: price(program, m, {}, temperature=temperature).total_s  # noqa: E731
        gradient = jax.grad(total)(M)
        return float(gradient.chip.cube_flops_16bit), float(gradient.chip.hbm_bytes_per_s)

    cube, hbm = slope(0.0)
    assert (cube == 0) != (hbm == 0)
    assert all(s < 0 for s in slope(1e-5))


def test_scopes_and_loops_say_where_time_goes():
    def layer(x, w):
        with jax.named_scope("attention"):
            x = x @ w
        with jax.named_scope("experts"), jax.named_scope("up"):
            return jnp.exp(x @ w), None

    def model(x, ws):
        with jax.named_scope("layers"):
            x = lax.scan(layer, x, ws)[0]
        with jax.named_scope("head"):
            return x @ ws[0]

    timeline = price(trace(model, X, array(7, 1024, 1024)), M, {})
    scopes = {k: float(v) for k, v in timeline.scopes.items()}
    assert set(scopes) >= {"layers/attention", "layers/experts/up", "head"}
    assert sum(scopes.values()) == pytest.approx(float(timeline.total_s), rel=1e-12)
    (loop,) = timeline.loops
    assert (loop.scope, loop.length) == ("layers", 7)
    inside = sum(v for k, v in scopes.items() if k.startswith("layers"))
    assert 7 * float(loop.each_s) == pytest.approx(inside, rel=1e-12)
    assert {k: float(v) for k, v in loop.streams_s.items()} == pytest.approx({"main": inside / 7})


def test_a_trace_file_is_json_whose_events_end_at_the_total(tmp_path):
    timeline = priced(3)
    path = tmp_path / "trace.json"
    timeline.to_perfetto(path)
    rows = json.loads(path.read_text())["traceEvents"]
    tracks = {r["tid"]: r["args"]["name"] for r in rows if r["ph"] == "M"}
    assert sorted(tracks.values()) == list(timeline.program.streams)
    events = [r for r in rows if r["ph"] == "X"]
    assert len(events) == len(timeline.events())
    end = max(e["ts"] + e["dur"] for e in events)
    assert end == pytest.approx(float(timeline.total_s) * 1e6, rel=1e-10)
    for row, event in zip(events, timeline.events(), strict=True):
        assert tracks[row["tid"]] == event.stream
        assert row["args"] == {"scope": event.scope, "iteration": list(event.iteration)}


def test_a_batched_timeline_has_no_events_until_indexed():
    program = symbolic_layers(3)
    many = jax.vmap(lambda r: price(program, M, {"rows": r}))(jnp.array([100.0, 2000.0]))
    with pytest.raises(ValueError, match=r"^events: the timeline is batched; index it to one"):
        many.events()
    second = jax.tree.map(lambda x: x[1], many)
    assert end_of(second.events()) == pytest.approx(float(second.total_s), rel=1e-10)


def test_an_empty_program_takes_no_time():
    timeline = price(trace(lambda x: x, X), M, {})
    assert float(timeline.total_s) == 0.0
    assert timeline.events() == [] and timeline.critical_path() == []
    idle = trace(lambda x: lax.scan(lambda x, _: (x, None), jnp.exp(x), length=9)[0], X)
    once = trace(jnp.exp, X)
    assert float(price(idle, M, {}).total_s) == float(price(once, M, {}).total_s) > 0


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        ({}, {}, "price: no value for size 'rows'; needed: ['rows']"),
        ({"rows": 8.0, "row": 8.0}, {}, "price: the program has no size 'row'; it has ['rows']"),
        ({"rows": 8.0, "zzz": 8.0}, {}, "price: the program has no size 'zzz'; it has ['rows']"),
        (
            {"rows": np.ones((2, 2))},
            {},
            "price: size 'rows' must be a number, or one per iteration of a loop (the program's "
            "loops have [3]); got shape (2, 2)",
        ),
        (
            {"rows": np.ones(4)},
            {},
            "price: size 'rows' must be a number, or one per iteration of a loop (the program's "
            "loops have [3]); got shape (4,)",
        ),
        (
            {"rows": 8.0},
            {"temperature": -1e-6},
            "price: temperature must be 0 or positive seconds, got -1e-06",
        ),
    ],
)
def test_a_price_that_makes_no_sense_is_refused(sizes, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        price(symbolic_layers(3), M, sizes, **options)
