"""Waiting for the slowest rank against order statistics, Monte-Carlo and hand-written schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.cost import price
from cmjax.cost.timeline import WAITING
from cmjax.cost.waiting import Differences, expected_maximum, wait_s
from cmjax.hardware import load_machine, replace_leaf
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


def test_the_gradient_of_no_wait_is_finite():
    slope = jax.grad(lambda j: wait_s(6e-4, 320, replace_leaf(M, "exchange.jitter_s", j)))(0.0)
    assert np.isfinite(float(slope))
