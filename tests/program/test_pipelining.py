"""Operations of the next iteration, issued in this one."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cmjax.cost import price
from cmjax.hardware import load_machine, replace_leaf
from cmjax.program import ahead, stream, trace

M = load_machine("cloudmatrix384")
X = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
W = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)


def product(x, w, *, on):
    with stream(on):
        return x @ w


def names(program):
    return [(op.stream.name, op.name) for op in program.operations]


def loop_of(program):
    (loop,) = (op.loop for op in program.operations if op.loop)
    return loop


def marked(x, y, w, *, length):
    """Two chains: the second one's product waits for what the other stream makes of it."""

    def layer(carry, _):
        x, y = carry
        with ahead():
            begun = product(x, w, on="compute")
        x = product(begun, w, on="compute")
        sent = product(y, w, on="exchange")
        y = product(sent, w, on="compute")
        return (x, y), None

    return lax.scan(layer, (x, y), length=length)[0]


def turned_by_hand(x, y, w, *, length):
    """`marked` with its first product at the end of the iteration before."""

    def layer(carry, _):
        begun, y = carry
        x = product(begun, w, on="compute")
        sent = product(y, w, on="exchange")
        begun = product(x, w, on="compute")
        y = product(sent, w, on="compute")
        return (begun, y), None

    begun = product(x, w, on="compute")
    return lax.scan(layer, (begun, y), length=length)[0]


def per_iteration_s(fn, machine=M):
    def total_s(length):
        program = trace(lambda *args: fn(*args, length=length), X, X, W)
        return float(price(program, machine, {}).total_s)

    with jax.enable_x64(True):
        return (total_s(41) - total_s(21)) / 20


def test_an_iteration_costs_what_it_does_if_turned_round_by_hand():
    assert per_iteration_s(marked) == pytest.approx(per_iteration_s(turned_by_hand), rel=1e-9)


def in_five_stages(x, y, w, *, length, mark):
    """Two microbatches of a layer: each begins, attends, is sent and is computed."""

    def layer(carry, _):
        x, y = carry
        with mark():
            x = product(x, w, on="compute")
        x = product(x, w, on="compute")
        x = product(x, w, on="exchange")
        y = product(y, w, on="compute")
        x = product(x, w, on="compute")
        y = product(y, w, on="compute")
        y = product(y, w, on="exchange")
        y = product(y, w, on="compute")
        return (x, y), None

    return lax.scan(layer, (x, y), length=length)[0]


def test_it_fills_the_wait_for_another_stream():
    quiet = replace_leaf(M, "chip.hbm_bytes_per_s", 1e18)
    plain, filled = (
        per_iteration_s(partial(in_five_stages, mark=mark), quiet)
        for mark in (contextlib.nullcontext, ahead)
    )
    # six products are computed; without the mark the second microbatch's exchange is waited for
    assert filled / plain == pytest.approx(6 / 7, rel=1e-9)


def test_the_work_is_the_same():
    program = trace(lambda *args: marked(*args, length=7), X, X, W)
    plain = 7 * 4 * 2 * 512 * 1024 * 1024
    assert program.totals({})["cube_flops_16bit"] == plain
    timeline = price(program, M, {})
    assert len(timeline.events()) == 7 * 4
    last = max(event.start_s + event.duration_s for event in timeline.events())
    assert last == pytest.approx(float(timeline.total_s), rel=1e-6)


def test_it_is_issued_before_its_stream_waits_for_another():
    loop = loop_of(trace(lambda *args: marked(*args, length=3), X, X, W))
    streams = [op.stream.name for op in loop.body.operations]
    assert streams == ["compute", "exchange", "compute", "compute"]
    assert [op.ahead for op in loop.body.operations] == [False, False, True, False]
    assert loop.carried == 3  # of which one is what was begun


def test_what_needs_its_own_iteration_stays_where_it_is():
    def layer(x, w):
        y = product(x, w, on="exchange")
        with ahead():
            y = product(y, w, on="compute")
        return product(y, w, on="exchange"), None

    program = trace(lambda x, w: lax.scan(lambda x, _: layer(x, w), x, length=3)[0], X, W)
    loop = loop_of(program)
    assert [op.ahead for op in loop.body.operations] == [False, True, False]
    assert loop.carried == 1


def test_outside_a_loop_a_mark_changes_nothing():
    def straight(x, w):
        with ahead():
            y = product(x, w, on="compute")
        return product(y, w, on="exchange")

    with_mark, without = (
        trace(fn, X, W)
        for fn in (
            straight,
            lambda x, w: product(product(x, w, on="compute"), w, on="exchange"),
        )
    )
    assert names(with_mark) == names(without)
    assert float(price(with_mark, M, {}).total_s) == float(price(without, M, {}).total_s)


def test_what_is_scanned_out_is_ready_when_the_loop_ends():
    def model(x, y, w):
        def layer(carry, _):
            x, y = carry
            with ahead():
                begun = product(x, w, on="compute")
            return (product(begun, w, on="compute"), y), jnp.sum(x)

        (x, y), each = lax.scan(layer, (x, y), length=5)
        return product(y, w, on="other"), jnp.exp(each)

    program = trace(model, X, X, W)
    at, loop = next((i, op.loop) for i, op in enumerate(program.operations) if op.loop)
    read = {op.name: s.index for op in program.operations for s in op.sources if s.op == at}
    assert loop.carried == 2  # `x`, and what was begun of it; `y` never changes
    assert read == {"exp": 2}
