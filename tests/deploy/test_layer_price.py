"""The price of a MoE block by its rows, each crossing for itself or a token once per rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.cost.price import price
from cmjax.deploy.layer_price import LayerPrice, _sampled
from cmjax.hardware import load_machine
from cmjax.placement import Loads, Plan, Routes, expected_reach, reach
from cmjax.placement.pricing import price_s
from cmjax.program import Size

TOKENS = 96.0


def priced(**changes) -> LayerPrice:
    shape = {"ranks": 8, "experts": 32, "redundant": 8, "tokens": TOKENS} | changes
    return LayerPrice("deepseek-r1", load_machine("cloudmatrix384"), **shape)


def test_the_slowest_rank_sets_the_time():
    time_s = priced()
    step = time_s.layer
    rows = TOKENS * step.copies * np.array([1.3, 0.9, 1, 1, 1, 1, 0.9, 0.9])
    with jax.enable_x64(True):
        sizes = step.symbols({"tokens": TOKENS, "rows": rows.max()})
        exact = float(price(step.trace(), time_s.machine, sizes).total_s)
        # Piecewise linear: only pieces with a kink are inexact.
        np.testing.assert_allclose(float(time_s(jnp.asarray(rows))), exact, rtol=2e-3)


def test_a_token_sent_once_per_rank_is_cheaper_the_fewer_ranks_there_are():
    saved = {}
    for ranks in (8, 64):
        layer = priced(ranks=ranks, experts=64, redundant=0)
        rows = jnp.full(ranks, TOKENS * layer.copies)
        each, once = (
            float(dataclasses.replace(layer, multicast=flag)(rows)) for flag in (False, True)
        )
        assert once < each
        saved[ranks] = 1 - once / each
    # Of 8 rows a token sends 5.25 to 8 ranks, 7.57 to 64.
    assert saved[8] > 3 * saved[64]


def test_the_price_never_falls_with_a_ranks_rows():
    time_s = priced(multicast=True)
    peak = jnp.linspace(1, 7.9, 50)[:, None]
    rest = jnp.broadcast_to((8 - peak) / 7, (50, 7))
    seconds = np.asarray(time_s(TOKENS * time_s.copies * jnp.concatenate([peak, rest], 1)))
    assert (np.diff(seconds) >= -1e-9).all()


COUNTS = Loads(np.random.default_rng(0).integers(1, 1000, (2, 3, 32)))


def test_counts_that_were_not_scaled_are_refused_in_one_line():
    layer = priced()
    tokens = COUNTS.counts.reshape(2, 3, 8, 4).sum(-1)
    with pytest.raises(ValueError, match=r"expected the 6,144 token copies of a step") as refused:
        price_s(layer, tokens)
    assert "LayerPrice.scale" in str(refused.value) and "\n" not in str(refused.value)
    scaled = layer.scale(COUNTS).counts.reshape(2, 3, 8, 4).sum(-1)
    assert (price_s(layer, scaled) > 0).all()
    # What a program traces has no total to look at, and a plan is priced before that.
    assert jax.jit(layer)(jnp.asarray(scaled)).shape == (2, 3)


@pytest.mark.parametrize("shared", [0, 2])
def test_scaled_loads_are_the_copies_of_a_step_with_the_same_shares(shared):
    layer = priced(redundant=8, shared=shared)
    scaled = layer.scale(COUNTS)
    np.testing.assert_allclose(scaled.counts.sum(-1), TOKENS * 8 * (8 + shared))
    routed = scaled.counts[..., :32]
    np.testing.assert_allclose(routed / routed.sum(-1, keepdims=True),
                               COUNTS.counts / COUNTS.counts.sum(-1, keepdims=True))  # fmt: skip
    np.testing.assert_allclose(scaled.counts[..., 32:], TOKENS * 8)  # every token
    with pytest.raises(ValueError, match="priced for 32 experts, the loads count 16"):
        layer.scale(Loads(np.ones((1, 16))))


def test_an_expert_weighs_what_a_slot_more_adds_to_a_rank():
    layer = priced()
    # Gate, up and down in INT8, with a float32 scale per output.
    assert layer.expert_bytes == 3 * 7168 * 2048 + 4 * (2 * 2048 + 7168)
    assert layer.with_slots(9).expert_bytes == layer.expert_bytes
    assert layer.with_slots(9).slots_per_rank == 9


def test_a_row_is_what_the_priced_layer_puts_on_the_links():
    layer = priced(ranks=64, experts=64, redundant=0)
    rows = TOKENS * layer.copies
    with jax.enable_x64(True):
        sizes = layer.layer.symbols({"tokens": TOKENS, "rows": rows})
        program = layer.layer.trace()
        crossing = sum(
            float(Size.of(operation.work.supernode_bytes).evaluate(sizes))
            for operation in program.operations
            if operation.work.kind in ("dispatch", "combine")
        )
    assert crossing == pytest.approx(layer.row_bytes * rows * 3 / 4)  # of four nodes


def test_the_price_is_the_same_whoever_asks_first():
    shape = {"ranks": 4, "experts": 24, "redundant": 0}  # of no other test: nothing is kept of it
    rows = jnp.full(4, TOKENS * 8)
    with jax.enable_x64(True):
        wide = float(priced(**shape)(rows))
    _sampled.cache_clear()
    with jax.enable_x64(False):
        assert float(priced(**shape)(rows)) == pytest.approx(wide, rel=3e-7)  # float32
    with jax.enable_x64(True):
        assert float(priced(**shape)(rows)) == wide


def test_tokens_below_one_are_refused():
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        priced(tokens=0)


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
