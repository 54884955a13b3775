"""The price of a MoE block by its rows, each crossing for itself or a token once per rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.cost.price import price
from cmjax.deploy.layer_price import row_time
from cmjax.deploy.moe_step import build_layer
from cmjax.hardware import load_machine
from cmjax.placement import Plan, Routes, expected_reach, reach

TOKENS = 96.0


@pytest.fixture(scope="module")
def block():
    machine = load_machine("cloudmatrix384")
    step = build_layer("deepseek-r1", machine, ranks=8, nodes=None, experts=32, redundant=8)
    return step, machine


def test_the_slowest_rank_sets_the_time(block):
    step, machine = block
    time_s = row_time(step, machine, tokens=TOKENS)
    rows = TOKENS * step.copies * np.array([1.3, 0.9, 1, 1, 1, 1, 0.9, 0.9])
    with jax.enable_x64(True):
        sizes = step.symbols({"tokens": TOKENS, "rows": rows.max()})
        exact = float(price(step.trace(), machine, sizes).total_s)
        # Piecewise linear: only pieces with a kink are inexact.
        np.testing.assert_allclose(float(time_s(jnp.asarray(rows))), exact, rtol=2e-3)


def test_a_token_sent_once_per_rank_is_cheaper_the_fewer_ranks_there_are(block):
    _, machine = block
    saved = {}
    for ranks in (8, 64):
        step = build_layer("deepseek-r1", machine, ranks=ranks, nodes=None, experts=64, redundant=0)
        rows = jnp.full(ranks, TOKENS * step.copies)
        each, once = (
            float(row_time(step, machine, tokens=TOKENS, once_per_rank=flag)(rows))
            for flag in (False, True)
        )
        assert once < each
        saved[ranks] = 1 - once / each
    # Of 8 rows a token sends 5.25 to 8 ranks, 7.57 to 64.
    assert saved[8] > 3 * saved[64]


def test_the_price_never_falls_with_a_ranks_rows(block):
    step, machine = block
    time_s = row_time(step, machine, tokens=TOKENS, once_per_rank=True)
    peak = jnp.linspace(1, 7.9, 50)[:, None]
    rest = jnp.broadcast_to((8 - peak) / 7, (50, 7))
    seconds = np.asarray(time_s(TOKENS * step.copies * jnp.concatenate([peak, rest], 1)))
    assert (np.diff(seconds) >= -1e-9).all()


def test_expected_reach_is_that_of_tokens_that_draw_their_experts_independently():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(400), 1)
    ids = np.array([rng.choice(400, 6, replace=False, p=shares[0]) for _ in range(4000)])
    routes = Routes(ids[:, None], 400)
    plan = Plan(rng.permutation(400)[None], 400, 16, 4)
    real, expected = reach(plan, routes), expected_reach(plan, routes.loads(), 6)
    # 4,000 tokens of up to 6 ranks scatter by about 0.8 / 63; without replacement adds a little.
    np.testing.assert_allclose(expected.ranks, real.ranks, atol=0.08)
    np.testing.assert_allclose(expected.nodes, real.nodes, atol=0.08)


def test_reach_without_experts_per_token_is_refused():
    plan = Plan(np.arange(4)[None], 4, 2)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        expected_reach(plan, Routes(np.zeros((1, 1, 1), int), 4).loads(), 0)
