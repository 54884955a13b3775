"""The convolution kernels: the bits of a NumPy reference, from every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax import native
from cmjax.primitives.convolution import codegen as conv_codegen
from cmjax.primitives.convolution import kernel as conv_kernel
from tests.native import conv1d_reference
from tests.native.conv1d_reference import Case

needs_kernels = pytest.mark.skipif(not native.status().enabled, reason=native.status().reason)


@needs_kernels
@pytest.mark.parametrize("isa, cpus", [("", 1), ("", 2), ("avx2", 2), ("scalar", 2)])
def test_every_instruction_set_and_number_of_threads_gives_the_bits_of_the_reference(isa, cpus):
    if len(os.sched_getaffinity(0)) < cpus:
        pytest.skip(f"this process may use fewer than {cpus} CPUs")
    done = subprocess.run(
        [sys.executable, conv1d_reference.__file__, str(cpus)],
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[2])}
        | ({"CMJAX_NATIVE_ISA": isa} if isa else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if not done.stdout.startswith(isa or native.status().isa):
        pytest.skip(f"this CPU has no {isa}")
    assert "bit-equal" in done.stdout


def _call(case: Case, **changes):
    """The kernel on a case's operands, some of them or of the attributes replaced."""
    x, u, scales = case.arrays()
    packed = conv_kernel.pack_filter(jnp.asarray(u), tap_blocks=case.tap_blocks)
    arrays = {"x": x, "packed": packed, **scales}
    static = case.static | {"operand_limit": case.limit}
    for name, change in changes.items():
        into = arrays if name in arrays else static
        into[name] = change(into[name]) if callable(change) else change

    @jax.jit
    def call(arrays):
        return conv_kernel.conv1d(
            arrays["x"], arrays["packed"], **static, **{k: arrays[k] for k in scales}
        )

    return call(arrays).block_until_ready()


@needs_kernels
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"packed": lambda p: p.astype(jnp.int32)}, "filter must be int8 or int16"),
        ({"packed": lambda p: p[:, :, 1:]}, r"\[points, panels, 1 \+ groups, 16, 4 or 2\]"),
        ({"packed": lambda p: p[:-1]}, "filter must be packed"),
        ({"x": lambda x: x[0]}, r"x and out must be \[batch, length, channels\]"),
        ({"x": lambda x: x[..., :-4]}, "filter must be packed"),
        ({"inverse_step": lambda s: s[:-1]}, r"inverse_step must be \[cin\]"),
        ({"requant": lambda r: r[:-1]}, r"requant must be \[points\]"),
        ({"scale": lambda s: s[:, :-1]}, r"scale must be \[points, cout\]"),
        ({"tap_blocks": 2}, "filter must be packed"),
        ({"padding": (-1, 0)}, "padding at least 0"),
        ({"input_limit": 0}, r"limits must lie in 1\.\.32767"),
        ({"input_limit": 2**15}, r"limits must lie in 1\.\.32767"),
        ({"operand_limit": 128}, r"operand_limit of an int8 filter in 1\.\.127"),
    ],
)
def test_the_kernel_refuses_what_does_not_fit(changes, message):
    case = Case(algorithm="F(4,3)", operand=np.int8)
    with pytest.raises(Exception, match=rf"conv1d: .*{message}"):
        _call(case, **changes)


@needs_kernels
def test_an_empty_batch_gives_an_empty_result():
    case = Case(algorithm="F(4,3)", operand=np.int8)
    assert _call(case, x=lambda x: x[:0]).shape == (0, case.out_length, case.cout)


@pytest.mark.parametrize(
    "algorithm, dilation", [("F(9,9)", 1), ("F(4,3)", 2)], ids=["unknown", "dilated"]
)
def test_an_algorithm_without_kernel_is_refused_by_name(algorithm, dilation):
    with pytest.raises(ValueError, match=r"conv1d: no kernel for 'F\(\d,\d\)' with dilation"):
        _call(Case(algorithm="F(4,3)", operand=np.int8), algorithm=algorithm, dilation=dilation)


@given(
    points=st.integers(1, 3),
    tap_blocks=st.integers(1, 3),
    cin=st.integers(1, 9),
    cout=st.integers(1, 33),
    operand=st.sampled_from([np.int8, np.int16]),
)
@settings(max_examples=20, deadline=None)
def test_unpacking_a_packed_filter_gives_it_back(points, tap_blocks, cin, cout, operand):
    rng = np.random.default_rng(0)
    u = rng.integers(-127, 128, (points, tap_blocks * cin, cout)).astype(operand)
    packed = conv_kernel.pack_filter(jnp.asarray(u), tap_blocks=tap_blocks)
    back = conv_kernel.unpack_filter(packed, tap_blocks=tap_blocks, cin=cin, cout=cout)
    np.testing.assert_array_equal(back, u)


@pytest.mark.parametrize(
    "pair, saturates",
    [((127, 1), 0), ((64, 64), 0), ((127, -127), 0), ((127, 2), 1), ((-100, -29), 1)],
)
def test_a_packed_column_starts_with_its_offset_and_says_whether_it_could_saturate(pair, saturates):
    u = np.zeros((1, 6, 3), np.int8)
    u[0, 2:4, 1] = pair
    starts = np.asarray(conv_kernel.pack_filter(jnp.asarray(u), tap_blocks=1))[0, 0, 0]
    expected = np.zeros(16, np.int32)
    expected[1] = -128 * sum(pair) + saturates
    np.testing.assert_array_equal(starts.copy().view(np.int32).ravel(), expected)


@pytest.mark.parametrize(
    "u, error, message",
    [
        (np.zeros((1, 4, 4), np.int32), TypeError, "u must be int8 or int16, got int32"),
        (np.zeros((1, 5, 4), np.int8), ValueError, "K a multiple of tap_blocks=2"),
        (np.zeros((4, 4), np.int8), ValueError, r"u must be \[points, K, cout\]"),
    ],
)
def test_packing_refuses_other_filters(u, error, message):
    with pytest.raises(error, match=f"pack_filter: .*{message}"):
        conv_kernel.pack_filter(jnp.asarray(u), tap_blocks=2)


def test_the_committed_transforms_are_what_the_generator_prints():
    assert conv_codegen.SOURCE.read_text() == conv_codegen.source(), (
        "run `python -m cmjax.primitives.convolution.codegen` and build the kernels again"
    )
