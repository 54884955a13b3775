"""The kernels of the DFSMN memory and of mel energies refuse buffers that cannot be right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import native

needs_kernels = pytest.mark.skipif(not native.status().enabled, reason=native.status().reason)


def _call(target: str, out: tuple, operands: dict, attributes: dict, changes: dict):
    given = operands | attributes | changes
    shape = jax.ShapeDtypeStruct(given.get("out", out), jnp.float32)
    static = {name: given[name] for name in attributes}

    @jax.jit
    def call(*arrays):
        return native.call(target, shape, *arrays, **static)

    return call(*(given[name] for name in operands)).block_until_ready()


def _memory(**changes):
    operands = {
        "x": np.zeros((2, 9, 3), np.float32),
        "p": np.zeros((2, 9, 3), np.float32),
        "past": np.zeros((4, 3), np.float32),
        "future": np.zeros((2, 3), np.float32),
        "span": np.zeros((2, 2), np.int32),
    }
    attributes = dict.fromkeys(("past_stride", "future_stride", "padding"), np.int64(1))
    return _call("cmjax_fsmn_memory", (2, 9, 3), operands, attributes, changes)


@needs_kernels
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": np.zeros((9, 3), np.float32)}, r"x, p and y must be \[batch, frames, channels\]"),
        ({"p": np.zeros((3, 9, 3), np.float32)}, "x, p and y must be"),
        ({"past": np.zeros((4, 2), np.float32)}, r"past and future must be \[taps, channels\]"),
        ({"past": np.zeros((0, 3), np.float32)}, "past and future must be"),
        ({"future": np.zeros((3,), np.float32)}, "past and future must be"),
        ({"span": np.zeros((1, 2), np.int32)}, r"span must be \[batch, 2\]"),
        ({"past_stride": np.int64(0)}, "strides must be at least 1, padding at least 0"),
        ({"padding": np.int64(-1)}, "padding at least 0"),
    ],
)
def test_the_memory_kernel_refuses_what_does_not_fit(changes, message):
    with pytest.raises(Exception, match=rf"fsmn_memory: .*{message}"):
        _memory(**changes)


def _mel(**changes):
    operands = {
        "x": np.zeros((2, 100), np.float32),
        "window": np.zeros(12, np.float32),
        "turn": np.zeros((16, 2), np.float32),
        "filter": np.zeros((5, 9), np.float32),
        "inside": np.zeros((5, 2), np.int32),
    }
    attributes = {"shift": np.int64(4), "emphasis": np.float32(0.9)}
    return _call("cmjax_mel_energies", (2, 23, 5), operands, attributes, changes)


@needs_kernels
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": np.zeros((3, 100), np.float32)}, r"x must be \[batch, samples\]"),
        ({"x": np.zeros((2, 99), np.float32)}, "every frame within x"),
        ({"shift": np.int64(0)}, "shift must be at least 1"),
        ({"window": np.zeros(17, np.float32)}, r"window \[points\] at most"),
        ({"turn": np.zeros((12, 2), np.float32)}, "points a power of two"),
        ({"filter": np.zeros((5, 8), np.float32)}, r"filter must be \[bands, points / 2 \+ 1\]"),
        ({"inside": np.zeros((4, 2), np.int32)}, r"inside \[bands, 2\]"),
        ({"inside": np.full((5, 2), 10, np.int32)}, "inside leaves the bins"),
    ],
)
def test_the_mel_kernel_refuses_what_does_not_fit(changes, message):
    with pytest.raises(Exception, match=rf"mel_energies: .*{message}"):
        _mel(**changes)


@needs_kernels
def test_what_fits_is_computed():
    assert not np.asarray(_memory()).any() and not np.asarray(_mel()).any()
    assert _mel(x=np.zeros((0, 100), np.float32), out=(0, 23, 5)).shape == (0, 23, 5)
