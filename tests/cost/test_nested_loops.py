"""Loops in loops, with sizes that differ from one iteration to the next."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.cost import price
from cmjax.hardware import load_machine
from cmjax.program import stream, trace

M = load_machine("cloudmatrix384")
BF16 = jnp.bfloat16
OUTER, INNER, WIDE = 4, 3, 1024


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def array(*shape):
    return jax.ShapeDtypeStruct(shape, BF16)


rows, more = jax.export.symbolic_shape("rows, more")
WEIGHTS = array(OUTER, WIDE, WIDE)


def layer(x, w):
    """One kernel outside and `INNER` inside an inner loop."""
    x = jnp.exp(x)
    return lax.scan(lambda x, _: (x @ w, None), x, length=INNER)[0]


def layers(x, ws):
    return lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]


def two_streams(x, y, ws):
    def outer(carry, w):
        def inner(carry, _):
            x, y = carry
            with stream("left", cube=16, vector=32):
                x = x @ w
            with stream("right", cube=8, vector=16):
                y = y @ w + jnp.exp(x)
            return (x, y), None

        x, y = lax.scan(inner, carry, length=INNER)[0]
        with stream("left", cube=16, vector=32):
            x = jnp.exp(x)
        return (x, y), None

    return lax.scan(outer, (x, y), ws)[0]


def end_of(events):
    return max(event.end_s for event in events)


def test_a_size_per_outer_iteration_holds_in_the_loops_inside():
    program = trace(layers, array(rows, WIDE), WEIGHTS)
    one = trace(layer, array(rows, WIDE), array(WIDE, WIDE))
    load = np.array([100.0, 9000.0, 300.0, 40000.0])
    found = price(program, M, {"rows": load})
    want = sum(float(price(one, M, {"rows": each}).total_s) for each in load)
    assert float(found.total_s) == pytest.approx(want, rel=1e-12)
    assert end_of(found.events()) == pytest.approx(want, rel=1e-10)
    assert float(found.flops) == pytest.approx(
        sum(one.totals({"rows": each})["flops"] for each in load), rel=1e-12
    )


def test_a_size_per_inner_iteration_is_the_same_in_every_outer_one():
    program = trace(layers, array(rows, WIDE), WEIGHTS)
    load = np.array([100.0, 9000.0, 40000.0])
    total = float(price(program, M, {"rows": load}).total_s)
    product = trace(lambda x, w: x @ w, array(rows, WIDE), array(WIDE, WIDE))
    before = trace(jnp.exp, array(rows, WIDE))
    inside = sum(float(price(product, M, {"rows": each}).total_s) for each in load)
    outside = float(price(before, M, {"rows": load.mean()}).total_s)
    assert total == pytest.approx(OUTER * (outside + inside), rel=1e-12)


def test_sizes_of_both_loops_combine():
    def grid(x, y, ws):
        def outer(carry, w):
            def inner(carry, _):
                x, y = carry
                return (x @ w, y @ w), None

            return lax.scan(inner, carry, length=INNER)[0], None

        return lax.scan(outer, (x, y), ws)[0]

    program = trace(grid, array(rows, WIDE), array(more, WIDE), WEIGHTS)
    by_outer, by_inner = np.array([10.0, 2e4, 3e3, 5e4]), np.array([1e4, 200.0, 3e4])
    found = price(program, M, {"rows": by_outer, "more": by_inner})
    product = trace(lambda x, w: x @ w, array(rows, WIDE), array(WIDE, WIDE))

    def seconds(each):
        return float(price(product, M, {"rows": each}).total_s)

    want = sum(seconds(a) + seconds(b) for a in by_outer for b in by_inner)
    assert float(found.total_s) == pytest.approx(want, rel=1e-12)
    assert end_of(found.events()) == pytest.approx(want, rel=1e-10)
    assert found.parts[-1].total.shape == (OUTER, INNER, 2)


@pytest.mark.parametrize("length", [OUTER, INNER])
def test_the_schedule_of_streams_in_nested_loops_is_an_event_replay(length):
    program = trace(two_streams, array(rows, WIDE), array(rows, WIDE), WEIGHTS)
    load = np.linspace(500.0, 20000.0, length)
    found = price(program, M, {"rows": load})
    assert end_of(found.events()) == pytest.approx(float(found.total_s), rel=1e-10)


def test_a_load_per_layer_has_a_gradient_in_every_layer_and_batches():
    program = trace(layers, array(rows, WIDE), WEIGHTS)

    def total(load):
        return price(program, M, {"rows": load}).total_s

    load = jnp.array([5e3, 1e4, 2e4, 3e4])
    gradient = np.asarray(jax.jit(jax.grad(total))(load))
    for i in range(OUTER):
        step = 1.0 * np.eye(OUTER)[i]
        quotient = float(total(load + step) - total(load - step)) / 2
        assert gradient[i] == pytest.approx(quotient, rel=1e-5)
    loads = jnp.stack([load, load[::-1], load * 2])
    many = jax.jit(jax.vmap(lambda load: price(program, M, {"rows": load})))(loads)
    for i in range(len(loads)):
        one = price(program, M, {"rows": loads[i]})
        assert float(many.total_s[i]) == pytest.approx(float(one.total_s), rel=1e-12)
        assert float(many.flops[i]) == pytest.approx(float(one.flops), rel=1e-12)
        for name, busy in one.engines.items():
            assert float(many.engines[name][i]) == pytest.approx(float(busy), rel=1e-12)
        for scope, spent in one.scopes.items():
            assert float(many.scopes[scope][i]) == pytest.approx(float(spent), rel=1e-12)


@pytest.mark.parametrize("load", [2000.0, np.linspace(1000.0, 3000.0, OUTER)])
def test_a_nested_loop_says_what_one_of_its_iterations_takes(load):
    program = trace(layers, array(rows, WIDE), WEIGHTS)
    timeline = price(program, M, {"rows": load})
    outer, inner = timeline.loops
    assert (outer.length, inner.length) == (OUTER, INNER)
    assert OUTER * float(outer.each_s) == pytest.approx(float(timeline.total_s), rel=1e-12)
    durations = [e.duration_s for e in timeline.events() if e.name == "dot_general"]
    assert float(inner.each_s) == pytest.approx(np.mean(durations), rel=1e-10)
    assert {k: float(v) for k, v in inner.streams_s.items()} == pytest.approx(
        {"main": np.mean(durations)}
    )


def test_streams_of_a_nested_loop_disturb_one_another_as_in_a_loop_of_its_own():
    """The inner loop's period is that of one iteration, however often the loop is run."""

    def inner_only(x, y, w):
        def inner(carry, _):
            x, y = carry
            with stream("left", cube=16, vector=32):
                x = jnp.negative(x)
            with stream("right", cube=8, vector=16):
                y = jnp.negative(y)
            return (x, y), None

        return lax.scan(inner, (x, y), length=50)[0]

    def repeated(x, y, w):
        return lax.scan(lambda c, _: (inner_only(*c, w), None), (x, y), length=20)[0]

    big = array(4096, 4096)
    once = float(price(trace(inner_only, big, big, big), M, {}).total_s)
    often = float(price(trace(repeated, big, big, big), M, {}).total_s)
    assert often == pytest.approx(20 * once, rel=1e-6)
