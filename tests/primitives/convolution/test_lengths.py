"""Zeros where signals do not exist, and convolutions that put them there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives.convolution import calibrate
from cmjax.primitives.convolution.lengths import zero_padding_frames
from cmjax.primitives.convolution.packed import prepack
from cmjax.primitives.convolution.winograd import winograd_conv1d

VALID_RANGE = np.array([[0, 9], [-4, 3], [5, 99], [7, 2]], np.int32)


def _zeroed(y: np.ndarray) -> np.ndarray:
    out = np.zeros_like(y)
    for row, (first, end) in enumerate(VALID_RANGE):
        inside = slice(max(first, 0), max(end, 0))
        out[row, inside] = y[row, inside]
    return out


def _signals():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 9, 5)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(3, 5, 6)), jnp.float32)


def test_frames_outside_the_valid_range_are_zero_and_others_as_they_were():
    x = np.random.default_rng(0).normal(size=(4, 9, 2)).astype(np.float32)
    np.testing.assert_array_equal(
        zero_padding_frames(jnp.asarray(x), jnp.asarray(VALID_RANGE)), _zeroed(x)
    )


@pytest.mark.parametrize("domain", ["float32", "int8", "int16"])
@pytest.mark.parametrize("algorithm", ["direct", "F(4,3)"])
def test_a_convolution_with_a_valid_range_is_the_one_without_and_zeros(domain, algorithm):
    x, w = _signals()
    options = {"algorithm": algorithm, "domain": domain, "activation": 0.2}
    wanted = _zeroed(np.asarray(winograd_conv1d(x, w, **options)))
    found = winograd_conv1d(x, w, valid_range=jnp.asarray(VALID_RANGE), **options)
    np.testing.assert_array_equal(found, wanted)


def test_a_packed_convolution_with_a_valid_range_can_be_mapped_and_has_no_gradient_outside():
    x, w = _signals()
    packed = prepack(w, calibrate(x, w, algorithm="F(4,3)"))

    def convolve(x, valid_range):
        return winograd_conv1d(x, packed, valid_range=valid_range)

    together = convolve(x, jnp.asarray(VALID_RANGE))
    pairs = (x.reshape(2, 2, 9, 5), jnp.asarray(VALID_RANGE).reshape(2, 2, 2))
    np.testing.assert_array_equal(jax.vmap(convolve)(*pairs).reshape(4, 9, 6), together)
    one_range = jax.vmap(convolve, in_axes=(0, None))(pairs[0], pairs[1][0])
    np.testing.assert_array_equal(one_range[0], together[:2])
    gradient = np.asarray(jax.grad(lambda x: convolve(x, jnp.asarray(VALID_RANGE)).sum())(x))
    # Output frames 0 to 2 of signal 1 see its frames 0 to 3; those of signal 3 do not exist.
    assert gradient[1, :4].any() and not gradient[1, 4:].any() and not gradient[3].any()


@pytest.mark.parametrize(
    "valid_range, error, message",
    [
        (np.zeros((4, 2), np.float32), TypeError, "valid_range must be int32, got float32"),
        (np.zeros((3, 2), np.int32), ValueError, r"valid_range must be \[4, 2\], .*got \[3, 2\]"),
        (np.zeros(2, np.int32), ValueError, r"valid_range must be \[4, 2\]"),
    ],
)
def test_another_valid_range_is_refused(valid_range, error, message):
    with pytest.raises(error, match=f"winograd_conv1d: {message}"):
        winograd_conv1d(*_signals(), valid_range=valid_range)
