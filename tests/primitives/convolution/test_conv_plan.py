"""A convolution resolved from shapes and options: what a plan says, and for whom it says it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cmjax.primitives.convolution.calibration import calibrate
from cmjax.primitives.convolution.choice import choose_algorithm
from cmjax.primitives.convolution.geometry import folding
from cmjax.primitives.convolution.plan import ConvPlan, FilterPlan, plan_conv, plan_filter


def _shapes(taps=5, cin=64, cout=64, length=40):
    x = jax.ShapeDtypeStruct((2, length, cin), jnp.float32)
    return x, jax.ShapeDtypeStruct((taps, cin, cout), jnp.float32)


def test_a_plan_is_made_of_shapes_alone_and_can_be_a_key():
    x, w = _shapes()
    plan = plan_conv("f", x, w, domain="int8", stride=2, activation=0.2)
    assert plan == ConvPlan(
        filter=FilterPlan(
            taps=5,
            cin=64,
            cout=64,
            stride=2,
            dilation=1,
            algorithm=choose_algorithm(3, 128, 64, domain="int8"),
            domain="int8",
        ),
        padding=(1, 2),
        slope=0.2,
    )
    assert hash(plan) == hash(plan_conv("f", x, w, domain="int8", stride=2, activation=0.2))
    assert plan.filter.fold == folding(5, 2, 1)
    assert plan.filter.tap_blocks == plan.filter.form.tap_blocks(3)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID"])
def test_padding_is_resolved_as_xla_resolves_it(padding, stride):
    x, w = _shapes(length=37)
    plan = plan_conv("f", x, w, padding=padding, stride=stride)
    want = lax.padtype_to_pads((37,), (5,), (stride,), padding)
    assert [plan.padding] == [tuple(map(int, pair)) for pair in want]


def test_a_filter_that_has_a_plan_keeps_it_whatever_the_signal():
    x, w = _shapes()
    filter = plan_filter("f", w, algorithm="F(4,5)")
    assert plan_conv("f", x, filter, padding=(2, 2)).filter is filter
    with pytest.raises(ValueError, match=r"packed with algorithm='F\(4,5\)', and 'direct' was"):
        plan_conv("f", x, filter, algorithm="direct")
    with pytest.raises(ValueError, match=r"f: x must be \[batch, length, 64\]"):
        plan_conv("f", jax.ShapeDtypeStruct((2, 40, 63), jnp.float32), filter)


def test_scales_decide_algorithm_and_domain_and_must_fit_the_filter():
    x, w = jnp.ones((1, 20, 4)), jnp.ones((3, 4, 6))
    scales = calibrate(x, w, algorithm="F(2,3)", domain="int16")
    plan = plan_filter("f", w, scales=scales)
    assert (plan.algorithm, plan.domain) == ("F(2,3)", "int16")
    with pytest.raises(ValueError, match=r"f: scales.filter_step must have shape \(4, 5\)"):
        plan_filter("f", w[..., :5], scales=scales)


def test_a_sum_that_could_overflow_is_refused_in_the_callers_words():
    with pytest.raises(ValueError, match="prepack: 150000 products of int8 operands"):
        plan_filter(
            "prepack",
            jax.ShapeDtypeStruct((3, 50_000, 1), jnp.float32),
            domain="int8",
            algorithm="direct",
        )
