"""Waiting for the slowest rank against order statistics, Monte-Carlo and hand-written schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.cost import price
from cmjax.cost.timeline import WAITING
from cmjax.cost.waiting import Differences, expected_maximum, variance_of_maximum, wait_s
from cmjax.hardware import load_machine, replace_leaf
from cmjax.primitives import combine, dispatch
from cmjax.primitives.grouped import stacked_dot
from cmjax.program import stream, trace

M = load_machine("cloudmatrix384")
RANKS = {"node": 2, "npu": 8, "die": 2}
X = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_the_expected_maximum_of_few_normal_variables_is_its_closed_form():
    assert expected_maximum(1) == pytest.approx(0.0, abs=1e-9)
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-5)
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-5)
    assert variance_of_maximum(2) == pytest.approx(1 - 1 / math.pi, rel=1e-5)


@pytest.mark.parametrize("ranks", [16, 320])
def test_a_wait_is_the_mean_of_what_ranks_wait_for_the_last_one(ranks):
    work_s = 6e-4
    rng = np.random.default_rng(0)
    arrivals = rng.normal(0.0, math.sqrt(M.exchange.jitter_s * work_s), (20_000, ranks))
    waited = np.mean(arrivals.max(1) - arrivals.mean(1))
    error = 4 * np.std(arrivals.max(1)) / math.sqrt(len(arrivals))
    assert float(wait_s(work_s, ranks, M)) == pytest.approx(waited, abs=error)


def exchange(x):
    return lax.all_to_all(x, tuple(RANKS), 0, 0, tiled=True)


def total_s(fn, machine=M, differences=Differences()):  # noqa: B008
    program = trace(fn, X, axis_sizes=RANKS)
    return price(program, machine, {}, differences=differences)


def test_an_exchange_waits_for_the_work_since_the_one_before():
    steady = replace_leaf(M, "exchange.jitter_s", 0.0)
    work = float(total_s(jnp.exp).total_s)

    def once(x):
        return exchange(jnp.exp(x))

    def twice(x):
        return exchange(jnp.exp(exchange(jnp.exp(x))))

    each = expected_maximum(32) * math.sqrt(M.exchange.jitter_s * work)
    for fn, exchanges in ((once, 1), (twice, 2)):
        found = total_s(fn)
        assert float(found.scopes[WAITING]) == pytest.approx(exchanges * each, rel=1e-6)
        more = float(found.total_s - total_s(fn, steady).total_s)
        assert more == pytest.approx(exchanges * each, rel=1e-6)


def test_groups_that_meet_among_themselves_wait_for_each_other_once_all_ranks_meet():
    group, works = 4, (3e-4, 5e-4, 2e-4)
    kernels = [jax.ShapeDtypeStruct((int(n * 4e6), 1024), jnp.bfloat16) for n in works]

    def step(x, y, z):
        parts = []
        for each in (x, y):
            each = jnp.exp(each)
            parts.append(lax.all_to_all(each, ("node", "die"), 0, 0, tiled=True))
        return exchange(jnp.exp(z)), parts

    program = trace(step, *kernels, axis_sizes=RANKS)
    found = price(program, M, {})
    assert len(program.operations) == 6
    steady = price(program, replace_leaf(M, "exchange.jitter_s", 0.0), {})
    work = [
        float(t)
        for op, t in zip(program.operations, steady.parts[0].total, strict=True)
        if op.work.ranks == 1
    ]
    sigma = np.sqrt(float(M.exchange.jitter_s) * np.array(work))
    rng = np.random.default_rng(0)
    late = np.zeros((40_000, 32 // group, group))
    for deviation in sigma[:2]:  # a group goes on with its last member
        late = late + rng.normal(0, deviation, late.shape)
        late = np.broadcast_to(late.max(-1, keepdims=True), late.shape)
    late = late + rng.normal(0, sigma[2], late.shape)
    waited = late.max((1, 2)).mean()
    assert float(found.scopes[WAITING]) == pytest.approx(waited, rel=0.02)


def test_a_stream_that_is_busy_hides_the_wait_for_another_streams_work():
    """What waits is the dependency between streams; a longer queue on the exchange's own stream
    takes its place."""

    def both(x, before):
        with stream("compute", cube=12, vector=24):
            y = jnp.exp(x)
        with stream("exchange", cube=12, vector=24):
            for _ in range(before):
                x = exchange(x)
            return exchange(y), x

    steady = replace_leaf(M, "exchange.jitter_s", 0.0)

    def cost(before):
        one, other = (total_s(lambda x: both(x, before), m).total_s for m in (M, steady))
        return float(one - other)

    work = float(total_s(lambda x: both(x, 0)[0]).parts[0].total[0])
    alone = expected_maximum(32) * math.sqrt(M.exchange.jitter_s * work)
    assert cost(0) == pytest.approx(alone, rel=1e-6)
    assert cost(20) == pytest.approx(0.0, abs=1e-12)


def test_ranks_with_other_contexts_wait_in_proportion_to_their_attention():
    work, attention, spread = 6e-4, 4e-4, 0.1
    steady = replace_leaf(M, "exchange.jitter_s", 0.0)
    want = expected_maximum(320) * spread * attention
    assert float(wait_s(work, 320, steady, jnp.asarray(spread * attention))) == pytest.approx(want)


def test_who_has_most_rows_need_not_be_who_jitters_most():
    """With both causes the last rank is as late as the largest of their sum is, over all ranks."""
    rows, axes = 64, tuple(RANKS)
    layout = {"axes": axes, "ranks": 32, "slots_per_rank": 1, "capacity": rows}
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((rows, 32), jnp.int32)
    w = jax.ShapeDtypeStruct((1, 4096, 4096), jnp.bfloat16)

    def layer(x, slots, w):
        sent = dispatch(x, slots, **layout)
        weights = jnp.ones(slots.shape, jnp.float32)
        return combine(stacked_dot(sent.rows, w), slots, sent.position, weights, **layout)

    program, load = trace(layer, x, slots, w, axis_sizes=RANKS), 1.3
    kinds = [op.work.kind for op in program.operations]
    product = next(i for i, op in enumerate(program.operations) if "stacked_dot" in op.name)
    even, uneven = (
        price(program, M, {}, differences=Differences(load=each)).parts[0] for each in (1.0, load)
    )
    at = kinds.index("combine")
    jitter, longer = float(even.waiting[at]), (1 - 1 / load) * float(even.cube[product])
    assert jitter > 0
    assert float(even.cube[product]) > float(even.hbm[product])
    # two normal causes, of which each alone makes the last of all ranks so late
    ranks = np.random.default_rng(0).normal(size=(2, 100_000, 32)) / expected_maximum(32)
    last = (jitter * ranks[0] + longer * ranks[1]).max(1).mean()
    assert longer + float(uneven.waiting[at]) == pytest.approx(last, rel=5e-3)
    assert float(uneven.waiting[kinds.index("dispatch")]) == float(
        even.waiting[kinds.index("dispatch")]
    )


def test_the_gradient_of_no_wait_is_finite():
    slope = jax.grad(lambda j: wait_s(6e-4, 320, replace_leaf(M, "exchange.jitter_s", j)))(0.0)
    assert np.isfinite(float(slope))
