"""Zeros where signals do not exist, and convolutions that put them there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.primitives.convolution.lengths import zero_outside
from cmjax.primitives.convolution.packed import prepack
from cmjax.primitives.convolution.scales import calibrate
from cmjax.primitives.convolution.winograd import winograd_conv1d

SPAN = np.array([[0, 9], [-4, 3], [5, 99], [7, 2]], np.int32)


def _zeroed(y: np.ndarray) -> np.ndarray:
    out = np.zeros_like(y)
    for row, (first, end) in enumerate(SPAN):
        inside = slice(max(first, 0), max(end, 0))
        out[row, inside] = y[row, inside]
    return out


def _signals():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 9, 5)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(3, 5, 6)), jnp.float32)


def test_frames_outside_the_span_are_zero_and_others_as_they_were():
    x = np.random.default_rng(0).normal(size=(4, 9, 2)).astype(np.float32)
    np.testing.assert_array_equal(zero_outside(jnp.asarray(x), jnp.asarray(SPAN)), _zeroed(x))


@pytest.mark.parametrize("domain", ["float32", "int8", "int16"])
@pytest.mark.parametrize("algorithm", ["direct", "F(4,3)"])
def test_a_convolution_with_a_span_is_the_one_without_and_zeros(domain, algorithm):
    x, w = _signals()
    options = {"algorithm": algorithm, "domain": domain, "activation": 0.2}
    wanted = _zeroed(np.asarray(winograd_conv1d(x, w, **options)))
    found = winograd_conv1d(x, w, span=jnp.asarray(SPAN), **options)
    np.testing.assert_array_equal(found, wanted)


def test_a_packed_convolution_with_a_span_can_be_mapped_and_has_no_gradient_outside():
    x, w = _signals()
    packed = prepack(w, calibrate(x, w, algorithm="F(4,3)"))

    def convolve(x, span):
        return winograd_conv1d(x, packed, span=span)

    together = convolve(x, jnp.asarray(SPAN))
    pairs = (x.reshape(2, 2, 9, 5), jnp.asarray(SPAN).reshape(2, 2, 2))
    np.testing.assert_array_equal(jax.vmap(convolve)(*pairs).reshape(4, 9, 6), together)
    one_span = jax.vmap(convolve, in_axes=(0, None))(pairs[0], pairs[1][0])
    np.testing.assert_array_equal(one_span[0], together[:2])
    gradient = np.asarray(jax.grad(lambda x: convolve(x, jnp.asarray(SPAN)).sum())(x))
    # Output frames 0 to 2 of signal 1 see its frames 0 to 3; those of signal 3 do not exist.
    assert gradient[1, :4].any() and not gradient[1, 4:].any() and not gradient[3].any()


@pytest.mark.parametrize(
    "span, error, message",
    [
        (np.zeros((4, 2), np.float32), TypeError, "span must be int32, got float32"),
        (np.zeros((3, 2), np.int32), ValueError, r"span must be \[4, 2\], .*got \[3, 2\]"),
        (np.zeros(2, np.int32), ValueError, r"span must be \[4, 2\]"),
    ],
)
def test_another_span_is_refused(span, error, message):
    with pytest.raises(error, match=f"winograd_conv1d: {message}"):
        winograd_conv1d(*_signals(), span=span)
