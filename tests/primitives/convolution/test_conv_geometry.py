"""Folded convolutions without stride equal XLA's with stride, dilation and every padding mode."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cmjax.primitives.convolution.geometry import explicit_padding, fold_filter, fold_input, folding


def _conv(x, w, stride, padding, dilation):
    layout = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, w, (stride,), padding, rhs_dilation=(dilation,), dimension_numbers=layout
    )


@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID", (3, 0), (-2, 5), (0, -1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_folding_equals_a_strided_convolution_of_integers(padding, stride):
    rng = np.random.default_rng(0)
    compared = 0
    for length, taps, dilation in itertools.product((8, 13), (1, 2, 5), (1, 2)):
        cut = 0 if isinstance(padding, str) else sum(padding)
        if padding not in ("SAME", "SAME_LOWER") and length + cut < dilation * (taps - 1) + 1:
            continue
        x = jnp.array(rng.integers(-5, 6, (2, length, 3)), jnp.float32)
        w = jnp.array(rng.integers(-5, 6, (taps, 3, 2)), jnp.float32)
        mode = padding if isinstance(padding, str) else [padding]
        want = _conv(x, w, stride, mode, dilation)
        fold = folding(taps, stride, dilation)
        pads = explicit_padding("f", padding, length, taps, stride, dilation)
        folded, pads = fold_input(x, pads, fold)
        got = _conv(folded, fold_filter(w, fold), 1, [pads], fold.dilation)
        np.testing.assert_array_equal(got, want)
        compared += 1
    assert compared >= 6


def test_a_stride_folds_frames_into_channels_and_a_matching_dilation_skips_them():
    assert (folding(48, 2, 1).taps, folding(48, 2, 1).frames) == (24, 2)
    assert (folding(3, 2, 1).taps, folding(3, 2, 1).lead) == (2, 1)
    assert (folding(3, 2, 4).dilation, folding(3, 2, 4).frames) == (2, 1)
    assert (folding(1, 3, 5).taps, folding(1, 3, 5).frames) == (1, 1)


@pytest.mark.parametrize("taps", [3, 5, 11])
def test_a_signal_of_whole_frames_is_folded_without_a_copy(taps):
    fold = folding(taps, 2, 1)
    x = jnp.arange(2.0 * 8 * 3).reshape(2, 8, 3)
    low = (taps - 1) // 2
    folded, pads = fold_input(x, (low, taps - 2 - low), fold)
    np.testing.assert_array_equal(folded, x.reshape(2, 4, 6))
    assert sum(pads) == fold.taps - 1
    assert folding(48, 2, 1).lead == 0  # a zero in front would be a 49th tap


@pytest.mark.parametrize("padding", ["same", (1, 2, 3), 3.5, ((1, 2), (3, 4)), (1.0, 2)])
def test_other_padding_is_refused(padding):
    with pytest.raises(ValueError, match="f: padding must be"):
        explicit_padding("f", padding, 8, 3, 1, 1)
