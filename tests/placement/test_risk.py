"""What counts of many windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.placement import Risk


@pytest.mark.parametrize(
    ("text", "expected", "tail"),
    [
        ("mean", 4.5, 10),
        ("worst", 9, 1),
        ("quantile:0.9", 8, 2),
        ("quantile:0", 0, 10),
        ("cvar:0.9", 9, 1),
        ("cvar:0.75", (9 + 8 + 0.5 * 7) / 2.5, 3),
        ("cvar:0", 4.5, 10),
    ],
)
def test_measures_agree_with_their_definition(text, expected, tail):
    risk = Risk.parse(text)
    values = np.random.default_rng(0).permutation(np.arange(10.0))
    assert risk(values) == pytest.approx(expected)
    assert risk.tail(10) == tail
    assert Risk.parse(str(risk)) == risk


@given(st.integers(1, 12), st.floats(0, 0.99), st.integers(0, 1000))
def test_cvar_lies_between_the_quantile_and_the_worst(windows, level, seed):
    values = np.random.default_rng(seed).random((windows, 3))
    cvar, quantile = Risk("cvar", level)(values), Risk("quantile", level)(values)
    assert (quantile <= cvar + 1e-12).all() and (cvar <= values.max(0) + 1e-12).all()
    assert (cvar >= values.mean(0) - 1e-12).all()
    # Rockafellar and Uryasev: cvar = min over t of t + mean(max(x - t, 0)) / (1 - q).
    formula = np.min([v + np.maximum(values - v, 0).mean(0) / (1 - level) for v in values], axis=0)
    share = (1 - level) * windows
    if share >= 1:
        np.testing.assert_allclose(cvar, formula, rtol=1e-9)


@pytest.mark.parametrize("text", ["mean", "worst", "cvar:0.6", "cvar:0.75", "quantile:0.5"])
def test_the_sharp_slope_is_the_derivative(text):
    risk, values = Risk.parse(text), np.random.default_rng(1).random(7)
    with jax.enable_x64(True):
        slope = np.asarray(risk.slope(jnp.asarray(values), 1e9))
    np.testing.assert_allclose(slope @ values, risk(values), rtol=1e-9)
    for window, bump in enumerate(1e-6 * np.eye(7)):
        rise = (risk(values + bump) - risk(values - bump)) / 2e-6
        assert slope[window] == pytest.approx(rise, abs=1e-6)


def test_windows_nearly_alike_share_the_weight_of_the_slowest():
    weights = Risk("worst").slope_at(np.array([200.0, 199.9, 150.0]))
    np.testing.assert_allclose(weights, [0.51, 0.49, 0.0], atol=0.02)
    assert Risk("worst").slope_at(np.array([200.0, 150, 150])) == pytest.approx([1, 0, 0])


@pytest.mark.parametrize("text", ["median", "cvar", "cvar:1", "quantile:x", "mean:0.5", "cvar:-1"])
def test_another_objective_is_refused_with_the_choices(text):
    with pytest.raises(ValueError, match="expected mean, worst, quantile:Q or cvar:Q"):
        Risk.parse(text)
