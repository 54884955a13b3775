"""The report on a user's Q, K, V: ranges by counting, errors by comparison, refusals by message."""

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives import attention_numerics, flash_attention, pasa_attention
from cmjax.primitives.attention.numerics import VARIANTS, Variant


def draw(mean, amplitude, *, length=200, heads=2, kv_heads=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((1, length, heads, 64),) + 2 * ((1, length, kv_heads, 64),)
    return [rng.uniform(mean - amplitude, mean + amplitude, s).astype(np.float16) for s in shapes]


def test_the_range_and_the_overflow_are_those_of_the_scores():
    q, k, v = draw(31, 10)
    found = attention_numerics(q, k, v, variants={})
    scores = np.einsum("btnd,bsd->bnts", q.astype(np.float64), k[:, :, 0].astype(np.float64))
    assert found.scores.smallest == pytest.approx(scores.min())
    assert found.scores.largest == pytest.approx(scores.max())
    over = scores >= 65520
    assert 0 < over.mean() < 1
    assert found.scores.overflowing == over.mean()
    assert found.scores.overflowing_rows == over.any(axis=-1).mean()
    assert found.shifted.overflowing == 0
    # scale (1 - beta) of the centre is left, 480 here, and the spread around it
    assert -300 < found.shifted.smallest < 480 < found.shifted.largest < 1500
    assert found.errors == {}


def test_masked_scores_do_not_count():
    q, k, v = draw(0, 1)
    k[:, 150:] = 2000
    q[:] = np.abs(q) + 1
    seen = np.arange(200) < 150
    with_mask = attention_numerics(q, k, v, mask=seen[None, None, None], variants={})
    assert (
        with_mask.scores.overflowing
        == 0
        < attention_numerics(q, k, v, variants={}).scores.overflowing
    )
    causal = attention_numerics(q, k, v, causal=True, variants={})
    assert causal.scores.overflowing < 0.1


def test_errors_are_those_of_running_each_variant():
    q, k, v = draw(5, 2)
    found = attention_numerics(q, k, v)
    assert tuple(found.errors) == tuple(VARIANTS)
    wide = [x.astype(np.float64) for x in (q, k[:, :, [0, 0]], v[:, :, [0, 0]])]
    scores = np.einsum("btnd,bsnd->bnts", *wide[:2]) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), wide[2])
    operands = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    for name, run in {
        "FA fp16": lambda *x: flash_attention(*x, precision="fp16", statistics="storage"),
        "PASA fp16": pasa_attention,
    }.items():
        rmse = np.sqrt(np.mean((np.asarray(run(*operands), np.float64) - exact) ** 2))
        assert found.errors[name].rmse == pytest.approx(rmse, rel=0.02)
        assert found.errors[name].relative_rmse == pytest.approx(
            rmse / np.sqrt(np.mean(exact**2)), rel=0.02
        )
    assert found.errors["FA fp32"].rmse < 0.1 * found.errors["FA fp16"].rmse
    assert found.input_rounding.rmse == 0  # the operands are float16


def test_overflow_shows_as_rows_that_are_not_finite_and_pasa_has_none():
    found = attention_numerics(*draw(36, 1))
    assert found.scores.overflowing == 1
    for name, error in found.errors.items():
        lost = name in ("FA fp16", "FA fp16-fp32")
        assert error.bad_rows == float(lost)
        assert np.isnan(error.rmse) == lost


def test_float32_operands_report_what_their_rounding_does():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(5, 1, (40, 1, 64)).astype(np.float32) for _ in "qkv")
    found = attention_numerics(q, k, v)
    assert 1e-5 < found.input_rounding.relative_rmse < 0.1
    assert found.errors["FA fp32"].relative_rmse < found.input_rounding.relative_rmse


def test_a_bfloat16_variant_is_compared_on_bfloat16_operands():
    q, k, v = draw(0, 1, length=64)
    found = attention_numerics(q, k, v, variants={"bf16": Variant(pasa_attention, "bf16")})
    assert 0 < found.errors["bf16"].relative_rmse < 0.03


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": np.ones((1, 200, 3, 64), np.float16)}, ValueError, "multiple of kv_heads"),
        ({"q": np.ones((1, 200, 2, 64), int)}, TypeError, "q must be floating point"),
        (
            {"v": np.full((1, 200, 1, 64), np.inf)},
            ValueError,
            "v must be finite and within float16",
        ),
        ({"q": np.full((1, 200, 2, 64), 7e4)}, ValueError, "q must be .* got 70000"),
        ({"k": np.full((1, 200, 1, 64), np.nan)}, ValueError, "k must be finite"),
        (dict.fromkeys("qkv", np.ones((0, 200, 1, 64))), ValueError, "q must not be empty"),
        ({"beta": 1.0}, ValueError, "beta must lie in"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
    ],
    ids=str,
)
def test_bad_inputs_are_refused_with_what_would_do(change, error, message):
    q, k, v = draw(0, 1)
    with pytest.raises(error, match=message):
        attention_numerics(**({"q": q, "k": k, "v": v} | change))
