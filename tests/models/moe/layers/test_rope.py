"""Rotary frequencies and YaRN against their formulas."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.models.moe.layers.rope import (
    angles,
    check_length,
    frequencies,
    rotary_amplitude,
    rotate,
    softmax_scale,
)
from cmjax.models.moe.positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnConfig,
)
from cmjax.models.moe.presets import deepseek_v3, tiny

YARN = deepseek_v3()


def test_plain_frequencies_are_powers_of_the_base():
    np.testing.assert_allclose(frequencies(tiny()), [1, 1e-1, 1e-2, 1e-3], rtol=1e-6)


def test_a_fraction_of_a_head_has_the_frequencies_of_a_head_of_that_width():
    half = dataclasses.replace(tiny(), rope=Rope(fraction=0.5))
    np.testing.assert_allclose(frequencies(half), [1, 1e-2], rtol=1e-6)


@pytest.mark.parametrize("interleave", [True, False])
def test_what_has_no_angle_passes_as_it_is(interleave):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10)), jnp.bfloat16)
    cos, sin = angles(jnp.arange(3), dataclasses.replace(tiny(), rope=Rope(fraction=0.5)))
    got = rotate(x, cos, sin, interleave=interleave)
    np.testing.assert_array_equal(got[:, 4:], x[:, 4:])
    alone = rotate(x[:, :4], cos, sin, interleave=interleave)
    np.testing.assert_array_equal(got[:, :4], alone)


def test_yarn_frequencies_equal_the_formula_of_deepseek():
    # turns over the original context decide; between 32 and 1 turns a linear ramp over dimensions
    dim, base, factor, context = 64, 10000.0, 40.0, 4096
    plain = np.array([base ** (-2 * i / dim) for i in range(32)])

    def corrected(turns):
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(corrected(32)), math.ceil(corrected(1))
    assert (low, high) == (10, 23)
    keep = 1 - np.clip((np.arange(32) - low) / (high - low), 0, 1)
    want = plain / factor * (1 - keep) + plain * keep
    np.testing.assert_allclose(frequencies(YARN), want, rtol=1e-6)
    np.testing.assert_allclose(frequencies(YARN)[:10], plain[:10], rtol=1e-6)
    np.testing.assert_allclose(frequencies(YARN)[23:], plain[23:] / 40, rtol=1e-6)


def test_yarn_scales_the_softmax_by_mscale_squared():
    mscale = 0.1 * math.log(40) + 1
    assert softmax_scale(YARN) == pytest.approx(192**-0.5 * mscale**2)
    assert softmax_scale(tiny()) == pytest.approx(24**-0.5)


@pytest.mark.parametrize(
    ("mscale", "all_dim", "want"),
    [
        (1.0, 1.0, 1.0),
        (0.707, 1.0, (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)),
        (None, None, 0.1 * math.log(40) + 1),
    ],
)
def test_amplitude_is_the_ratio_of_the_two_mscales(mscale, all_dim, want):
    yarn = YarnConfig(
        factor=40.0, original_max_position=4096, mscale=mscale, mscale_all_dim=all_dim
    )
    assert rotary_amplitude(dataclasses.replace(YARN, rope=Rope(scaling=yarn))) == pytest.approx(
        want
    )


@pytest.mark.parametrize("interleave", [True, False])
def test_rotation_is_complex_multiplication_and_products_depend_on_distance(interleave):
    config = tiny()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 8))

    def turned(v, position):
        cos, sin = angles(jnp.array(position), config)
        return np.asarray(rotate(jnp.asarray(v, jnp.float32), cos, sin, interleave=interleave))

    pairs = (x[0::2] + 1j * x[1::2]) if interleave else (x[:4] + 1j * x[4:])
    want = pairs * np.exp(5j * np.array([1, 0.1, 0.01, 0.001]))
    np.testing.assert_allclose(turned(x, 5)[:4], want.real, atol=1e-5)
    np.testing.assert_allclose(turned(x, 5)[4:], want.imag, atol=1e-5)
    near, far = turned(x, 3) @ turned(y, 1), turned(x, 33) @ turned(y, 31)
    assert near == pytest.approx(far, abs=1e-4)
    assert abs(near - turned(x, 4) @ turned(y, 1)) > 1e-3


def _scaled(scaling, **options):
    return dataclasses.replace(tiny(), rope=Rope(scaling=scaling), **options)


def test_linear_scaling_divides_every_frequency_and_dynamic_scaling_none():
    plain = frequencies(tiny())
    np.testing.assert_allclose(frequencies(_scaled(LinearScaling(factor=4.0))), plain / 4)
    dynamic = _scaled(DynamicScaling(factor=4.0), max_position=100)
    np.testing.assert_array_equal(frequencies(dynamic), plain)
    check_length(dynamic, 100)
    with pytest.raises(ValueError, match=r"beyond max_position 100, .* got 101"):
        check_length(dynamic, 101)


def test_llama3_keeps_fast_frequencies_divides_slow_ones_and_ramps_over_the_turns():
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=100
    )
    # 1, 0.1, 0.01, 0.001 radians: 15.9, 1.59, 0.159, 0.0159 turns over 100 positions
    ramp = (0.1 * 100 / (2 * math.pi) - 1) / 3
    want = [1, 0.1 * ramp + 0.1 / 8 * (1 - ramp), 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(frequencies(_scaled(scaling)), want, rtol=1e-6)


def test_an_attention_factor_replaces_the_mscales_and_an_open_ramp_is_not_rounded():
    yarn = YarnConfig(
        factor=4.0, original_max_position=64, attention_factor=1.3, mscale=2.0, truncate=False
    )
    assert rotary_amplitude(_scaled(yarn)) == 1.3
    low, high = (
        8 * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(10000)) for turns in (32, 1)
    )
    keep = 1 - np.clip((np.arange(4) - max(low, 0)) / (high - max(low, 0)), 0, 1)
    plain = frequencies(tiny())
    want = plain * keep + plain / 4 * (1 - keep)
    np.testing.assert_allclose(frequencies(_scaled(yarn)), want, rtol=1e-6)
