"""The DFSMN memory against its formula in loops, bit for bit, with and without kernels."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import native
from cmjax.primitives.convolution.fsmn import fsmn_memory
from cmjax.program import trace

CASES = [  # frames, channels, N1, N2, strides
    (1, 1, 1, 0, (1, 1)),
    (7, 5, 3, 2, (1, 1)),
    (8, 16, 10, 5, (1, 1)),
    (250, 67, 10, 5, (1, 1)),
    (33, 35, 4, 6, (2, 3)),
    (9, 8, 20, 20, (1, 2)),
]
VALID_RANGE = jnp.array([[0, 999], [-3, 5], [3, 7]], jnp.int32)


def _case(frames, channels, n1, n2, strides):
    rng = np.random.default_rng(frames)
    shapes = ((3, frames, channels), (3, frames, channels), (n1, channels), (n2, channels))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes], strides


def _loops(x, p, past, future, strides):
    """Float32, one rounding after the other, in the order of the formula."""
    x, p, past, future, valid_range = map(np.asarray, (x, p, past, future, VALID_RANGE))
    frames = x.shape[1]
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        if not valid_range[b, 0] <= t < valid_range[b, 1]:
            continue
        total = p[b, t].copy()
        steps = [(tap, t - strides[0] * i) for i, tap in enumerate(past)]
        steps += [(tap, t + strides[1] * j) for j, tap in enumerate(future, start=1)]
        for tap, at in steps:
            total += tap * (p[b, at] if 0 <= at < frames else np.float32(0))
        y[b, t] = x[b, t] + total
    return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_equal_the_formula_in_loops_bit_for_bit(case):
    operands, strides = _case(*case)
    found = fsmn_memory(*operands, VALID_RANGE, strides=strides)
    np.testing.assert_array_equal(found, _loops(*operands, strides))
    # A stream brings what the taps meet instead of zeros.
    x, p, past, future = operands
    reach = ((len(past) - 1) * strides[0], len(future) * strides[1])
    context = jnp.pad(p, ((0, 0), reach, (0, 0)))
    streamed = fsmn_memory(x, context, past, future, VALID_RANGE, strides=strides, padding=(0, 0))
    np.testing.assert_array_equal(streamed, found)


SAME_BITS = """
import sys, numpy as np
sys.path.insert(0, {root!r})
from tests.primitives.convolution.test_fsmn import (
    CASES, VALID_RANGE, _case, _loops, fsmn_memory, native
)
assert native.status().isa == {isa!r}, native.status()
for case in CASES:
    operands, strides = _case(*case)
    got = fsmn_memory(*operands, VALID_RANGE, strides=strides)
    np.testing.assert_array_equal(got, _loops(*operands, strides))
print("same bits")
"""


@pytest.mark.parametrize("isa", ["xla", "scalar", "avx2"])
def test_xla_and_the_kernels_of_every_instruction_set_give_the_same_bits(isa):
    running = native.status()
    order = ["xla", "scalar", "avx2", "avx512_vnni"]
    if isa != "xla" and (not running.enabled or order.index(isa) > order.index(running.isa)):
        pytest.skip(f"no {isa} kernels here: {running.reason}")
    switch = {"CMJAX_NATIVE": "off"} if isa == "xla" else {"CMJAX_NATIVE_ISA": isa}
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", SAME_BITS.format(root=root, isa=isa)],
        env=os.environ | switch | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip().endswith("same bits"), done.stderr[-2000:]


def test_the_gradient_is_that_of_the_formula():
    operands, strides = _case(9, 3, 4, 2, (2, 1))
    rng = np.random.default_rng(1)
    weight = np.float32(rng.normal(size=operands[0].shape))
    moves = [np.float32(rng.normal(size=a.shape)) for a in operands]

    def value(x, p, past, future):
        return (weight * fsmn_memory(x, p, past, future, VALID_RANGE, strides=strides)).sum()

    def exact(step):
        moved = [np.float64(a) + step * np.float64(d) for a, d in zip(operands, moves, strict=True)]
        return (weight * _loops(*moved, strides)).sum()

    gradients = jax.grad(value, argnums=(0, 1, 2, 3))(*operands)
    found = sum((g * d).sum() for g, d in zip(gradients, moves, strict=True))
    # The formula is of degree 2, for which central differences have no error but rounding's.
    np.testing.assert_allclose(found, (exact(0.5) - exact(-0.5)), rtol=1e-4)


def test_it_can_be_mapped_over_signals_and_over_taps():
    operands, _ = _case(9, 3, 4, 2, (1, 1))
    x, p, past, future = operands
    over_signals = jax.vmap(lambda x, p, valid_range: fsmn_memory(x, p, past, future, valid_range))
    alone = over_signals(x[:, None], p[:, None], jnp.asarray(VALID_RANGE)[:, None])
    np.testing.assert_array_equal(alone[:, 0], fsmn_memory(x, p, past, future, VALID_RANGE))
    over_taps = jax.vmap(lambda past: fsmn_memory(x, p, past, future, VALID_RANGE))
    two = over_taps(jnp.stack([past, 2 * past]))
    np.testing.assert_array_equal(two[1], fsmn_memory(x, p, 2 * past, future, VALID_RANGE))


def test_it_is_priced_by_its_products_and_sums():
    shapes = ((2, 50, 8), (2, 50, 8), (10, 8), (5, 8))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = trace(fsmn_memory, *args, jax.ShapeDtypeStruct((2, 2), jnp.int32))
    (operation,) = program.operations
    assert operation.work.flops == 2 * 50 * 8 * (2 * 15 + 2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": np.zeros((9, 3), np.float32)}, ValueError, r"x must be \[batch, frames, channels\]"),
        ({"x": np.zeros((3, 9, 3), np.int32)}, TypeError, "x must be floating point, got int32"),
        ({"p": np.zeros((3, 8, 3), np.float32)}, ValueError, r"p must be \[3, 9, 3\], got \[3, 8"),
        ({"past": np.zeros((0, 3), np.float32)}, ValueError, r"past must be \[at least 1, 3\]"),
        ({"future": np.zeros((2, 4), np.float32)}, ValueError, r"future must be \[taps, 3\]"),
        ({"valid_range": np.zeros((2, 2), np.int32)}, ValueError, r"valid_range must be \[3, 2\]"),
        ({"strides": (0, 1)}, ValueError, r"strides must be two numbers of at least 1, got \(0, 1"),
        ({"padding": (0, 0)}, ValueError, r"padding \(0, 0\), p must be \[3, 14, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    operands, _ = _case(9, 3, 4, 2, (1, 1))
    given = dict(zip(("x", "p", "past", "future"), operands, strict=True)) | {
        "valid_range": VALID_RANGE
    }
    with pytest.raises(error, match=f"fsmn_memory: .*{message}"):
        fsmn_memory(**given | change)
