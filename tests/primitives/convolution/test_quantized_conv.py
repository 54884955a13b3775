"""The integer pipeline against NumPy, bit for bit, with and without kernels."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import native
from cmjax.primitives.convolution import kernel as conv_kernel
from cmjax.primitives.convolution.quantized import quantized_conv, quantized_conv_p
from cmjax.primitives.convolution.ranges import filter_limit, largest_input_limit
from cmjax.primitives.convolution.straight_line import as_float32
from cmjax.primitives.convolution.toom_cook import ALGORITHMS

CASES = [  # algorithm, taps, dilation
    ("direct", 1, 1),
    ("direct", 5, 3),
    ("F(2,3)", 3, 1),
    ("F(4,3)", 2, 1),
    ("F(3,3)", 8, 1),
    ("F(4,5)", 5, 1),
    ("F(3,3)+F(3,2)", 5, 1),
    ("N44", 7, 1),
    ("N69", 7, 1),
    ("N88", 17, 1),
]


def _case(algorithm, taps, dilation, domain, *, batch=2, length=23, cin=5, cout=18, seed=0):
    form, rng = ALGORITHMS[algorithm], np.random.default_rng(seed)
    depth = form.tap_blocks(taps) * cin
    limit = 127 if domain == "int8" else 2047
    arrays = {
        "x": rng.normal(size=(batch, length, cin)).astype(np.float32),
        "u": rng.integers(-limit, limit + 1, (form.n, depth, cout)).astype(domain),
        "input_step": rng.uniform(1e-4, 2e-4, cin).astype(np.float32),
        "point_step": rng.uniform(0.8, 2, form.n).astype(np.float32) * np.float32(3e4 / limit),
        "filter_step": rng.uniform(0.1, 1, (form.n, cout)).astype(np.float32) / limit,
        "bias": rng.normal(size=cout).astype(np.float32),
    }
    static = {
        "algorithm": algorithm,
        "taps": taps,
        "dilation": dilation,
        "padding": (dilation * (taps - 1) // 2, 1),
        "input_limit": 30000,
        "operand_limit": limit,
        "slope": 0.2,
        "packed": False,
    }
    return arrays, static


def _numpy(x, u, input_step, point_step, filter_step, bias, **static):
    """One output tile, point and tap block after the other; integers in int64, else float32."""
    form = ALGORITHMS[static["algorithm"]]
    bt = np.array([[int(c) for c in row] for row in form.bt])
    low, high = static["padding"]
    dilation, blocks = static["dilation"], form.tap_blocks(static["taps"])
    outputs = x.shape[1] + low + high - dilation * (static["taps"] - 1)
    one = np.float32(1)
    inverse_step, requant = one / input_step, one / point_step
    scale = (input_step.max() * point_step)[:, None] * filter_step
    bound, limit, cin = static["input_limit"], static["operand_limit"], x.shape[2]
    xi = np.clip(np.round(x * inverse_step), -bound, bound).astype(np.int64)
    xi = np.pad(xi, ((0, 0), (low, 5 * (form.window + form.m * blocks) + high), (0, 0)))

    def operands(tile):
        start = tile * form.m
        exact = np.einsum("pj,bjc->bpc", bt, xi[:, start : start + form.window])
        real = exact.astype(np.float32) * requant[:, None]
        return np.clip(np.round(real), -limit, limit).astype(np.int64)

    y = []
    for tile in range(-(-outputs // form.m)):
        sums = 0
        for block in range(blocks):
            filter_block = u[:, block * cin : (block + 1) * cin].astype(np.int64)
            sums += np.einsum("bpc,pco->bpo", operands(tile + dilation * block), filter_block)
        assert np.abs(sums).max() < 2**31
        products = sums.astype(np.float32) * scale
        y += form.at_program.apply(
            list(np.moveaxis(products, 1, 0)), lambda c, value: as_float32(c) * value
        )
    y = np.stack(y[:outputs], 1) + bias
    return np.maximum(y, np.float32(static["slope"]) * y)


@pytest.mark.parametrize("domain", ["int8", "int16"])
@pytest.mark.parametrize(("algorithm", "taps", "dilation"), CASES)
def test_values_equal_numpy_bit_for_bit(algorithm, taps, dilation, domain):
    arrays, static = _case(algorithm, taps, dilation, domain)
    want = _numpy(**arrays, **static)
    assert want.dtype == np.float32
    got = quantized_conv(**arrays, **static)
    np.testing.assert_array_equal(got, want)
    blocks = ALGORITHMS[algorithm].tap_blocks(taps)
    packed = arrays | {"u": conv_kernel.pack_filter(arrays["u"], tap_blocks=blocks)}
    np.testing.assert_array_equal(quantized_conv(**packed, **static | {"packed": True}), want)
    floats = arrays | {"u": arrays["u"] * arrays["filter_step"][:, None]}  # rounds to the same
    np.testing.assert_array_equal(quantized_conv(**floats, **static), want)


def test_every_rounding_is_kept_whatever_program_the_convolution_stands_in():
    """XLA may not contract scales, sums and what the caller does before and after."""
    arrays, static = _case("F(4,3)", 3, 1, "int8")
    want = 3 * _numpy(**arrays | {"x": arrays["x"] * np.float32(0.3)}, **static)
    names = list(arrays)

    @jax.jit
    def program(*values):
        given = dict(zip(names, values, strict=True))
        return 3 * quantized_conv(**given | {"x": given["x"] * 0.3}, **static)

    np.testing.assert_array_equal(program(*arrays.values()), want)
    constants = jax.jit(lambda x: 3 * quantized_conv(**arrays | {"x": x * 0.3}, **static))
    np.testing.assert_array_equal(constants(arrays["x"]), want)


SAME_BITS = """
import sys, numpy as np, jax
sys.path.insert(0, {root!r})
from cmjax import native
from tests.primitives.convolution.test_quantized_conv import CASES, _case, _numpy, quantized_conv
assert native.status().isa == {isa!r}, native.status()
for algorithm, taps, dilation in CASES[1::2]:
    for domain in ("int8", "int16"):
        arrays, static = _case(algorithm, taps, dilation, domain, cin=7, cout=33, length=41, seed=1)
        got = quantized_conv(**arrays, **static)
        np.testing.assert_array_equal(got, _numpy(**arrays, **static))
print("same bits")
"""


@pytest.mark.parametrize("isa", ["xla", "scalar", "avx2", "avx512_vnni"])
def test_xla_and_the_kernels_of_every_instruction_set_give_the_same_bits(isa):
    running = native.status()
    order = ["xla", "scalar", "avx2", "avx512_vnni"]
    if isa != "xla" and (not running.enabled or order.index(isa) > order.index(running.isa)):
        pytest.skip(f"no {isa} kernels here: {running.reason}")
    root = str(Path(__file__).parents[3])
    switch = {"CMJAX_NATIVE": "off"} if isa == "xla" else {"CMJAX_NATIVE": "on"}
    if isa != "xla":
        switch["CMJAX_NATIVE_ISA"] = isa
    environment = os.environ | switch | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SAME_BITS.format(root=root, isa=isa)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip().endswith("same bits"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("algorithm", "taps", "factor", "safe"),
    [("F(2,3)", 3, 2, 22190), ("F(4,3)-lavin", 3, 24, 554), ("F(2,5)-lavin", 5, 24, 429)],
)
def test_int16_operands_give_the_direct_integer_convolution_times_a_factor(
    algorithm, taps, factor, safe
):
    """int8 signals and filters, an integer G, no rounding anywhere: nothing is lost."""
    form, rng = ALGORITHMS[algorithm], np.random.default_rng(0)
    x = rng.integers(-127, 128, (2, 19, 9))
    w = rng.integers(-127, 128, (taps, 9, 4))
    g = np.array([[int(factor * c) for c in row] for row in form.g])
    u = np.einsum("pj,jco->pco", g, w)
    got = quantized_conv(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(u, jnp.int16),
        input_step=jnp.ones((), jnp.float32),
        point_step=jnp.ones(form.n, jnp.float32),
        filter_step=jnp.ones((form.n, 4), jnp.float32),
        bias=jnp.zeros(4, jnp.float32),
        algorithm=algorithm,
        taps=taps,
        dilation=1,
        padding=(0, 0),
        input_limit=127,
        operand_limit=2047,
        slope=1.0,
        packed=False,
    )
    windows = np.stack([x[:, j : j + 19 - taps + 1] for j in range(taps)], 1)
    np.testing.assert_array_equal(got, factor * np.einsum("bjtc,jco->bto", windows, w))
    worst = 127 * form.growth * 127 * int(np.abs(g).sum(1).max())
    assert (2**31 - 1) // worst == safe


def test_depths_that_could_overflow_are_refused_with_the_largest_safe_one():
    assert filter_limit("int8", 133_144) == 127
    assert 127 * 127 * 133_144 < 2**31 <= 127 * 127 * 133_145
    with pytest.raises(ValueError, match="input channels times tap blocks is 133144"):
        filter_limit("int8", 133_145)
    for depth in (100, 513, 1000, 8260):
        assert depth * 2047 * filter_limit("int16", depth) < 2**31
    assert filter_limit("int16", 512) == 2047
    with pytest.raises(ValueError, match=r"int16 operands could overflow .* tap blocks is 8260"):
        filter_limit("int16", 8261)


def test_the_input_range_keeps_the_transform_exact_in_float32():
    for name, form in ALGORITHMS.items():
        assert largest_input_limit(name) * form.growth < 2**24
    assert largest_input_limit("direct") == 32767


def _gradient_case():
    arrays, static = _case("F(3,3)", 3, 1, "int8", batch=1, length=8, cin=2, cout=3)
    arrays["u"] = arrays["u"] * arrays["filter_step"][:, None]
    return arrays, static


def test_derivatives_are_those_of_the_formula_in_real_numbers():
    """Fine steps, wide ranges: every rounding is small, and y is the convolution itself."""
    arrays, static = _gradient_case()
    static |= {"operand_limit": 2047, "slope": 1.0}
    arrays["point_step"] /= 3
    arrays["filter_step"] /= 16
    arrays["input_step"] = arrays["input_step"][:1].reshape(())
    form, rng = ALGORITHMS["F(3,3)"], np.random.default_rng(1)
    bt, at = np.array(form.bt, float), np.array(form.at, float)

    def real(x, u):
        low, high = static["padding"]
        outputs = x.shape[1] + low + high - 2
        x = np.pad(x.astype(float), ((0, 0), (low, 9), (0, 0)))
        y = []
        for tile in range(-(-outputs // 3)):
            v = np.einsum("pj,bjc->bpc", bt, x[:, 3 * tile : 3 * tile + 5])
            y += list(np.einsum("ip,bpo->ibo", at, np.einsum("bpc,pco->bpo", v, u.astype(float))))
        return np.stack(y[:outputs], 1)

    y = quantized_conv(**arrays, **static)
    np.testing.assert_allclose(
        y, real(arrays["x"], arrays["u"]) + arrays["bias"], atol=0.02 * y.std()
    )
    dx, du = (rng.normal(size=arrays[name].shape).astype(np.float32) for name in ("x", "u"))

    def fn(x, u):
        return quantized_conv(**arrays | {"x": x, "u": u}, **static)

    _, tangent = jax.jvp(fn, (arrays["x"], arrays["u"]), (dx, du))
    want = real(dx, arrays["u"]) + real(arrays["x"], du)
    np.testing.assert_allclose(tangent, want, atol=0.01 * np.std(want))
    ct = rng.normal(size=y.shape).astype(np.float32)
    gx, gu = jax.vjp(fn, arrays["x"], arrays["u"])[1](ct)
    np.testing.assert_allclose((gx * dx).sum() + (gu * du).sum(), (ct * tangent).sum(), rtol=1e-4)


@pytest.mark.parametrize("name", ["input_step", "point_step", "filter_step"])
def test_the_gradient_of_a_step_is_the_learned_step_size_rule_through_the_convolution(name):
    """Where every value saturates, y is smooth in the step, and differences see it."""
    arrays, static = _gradient_case()
    static |= {"slope": 1.0, "input_limit": 127}
    arrays["input_step"] = arrays["input_step"][:1].reshape(())
    arrays["point_step"] = np.ones(5, np.float32)
    arrays["bias"] = np.zeros(3, np.float32)
    arrays[name] = arrays[name] * np.float32(1e-5)  # now all of its values saturate
    ct = np.random.default_rng(1).normal(size=(1, 8, 3)).astype(np.float32)
    ct = ct[:, : quantized_conv(**arrays, **static).shape[1]]

    def loss(factor):
        return (quantized_conv(**arrays | {name: arrays[name] * factor}, **static) * ct).sum()

    difference = (loss(1.05) - loss(0.95)) / 0.1
    assert abs(difference) > 0
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(1.0)), difference, rtol=2e-3)


def test_inputs_that_saturate_pass_no_gradient_and_a_relu_none_where_it_is_off():
    arrays, static = _gradient_case()
    static |= {"slope": 0.0}

    def total(x):
        return quantized_conv(**arrays | {"x": x}, **static).sum()

    big = arrays["x"].copy()
    big[0, 3, 1] = 1e6
    assert jax.grad(total)(big)[0, 3, 1] == 0
    below = arrays | {"bias": np.full(3, -1e9, np.float32)}
    gradient = jax.grad(lambda x: quantized_conv(**below | {"x": x}, **static).sum())(big)
    np.testing.assert_array_equal(gradient, 0)


def test_a_batch_of_signals_joins_the_batch_and_filters_of_their_own_are_mapped():
    arrays, static = _case("F(2,3)", 3, 1, "int8", batch=2, length=9)
    x = np.random.default_rng(2).normal(size=(3, 2, 9, 5)).astype(np.float32)

    def fn(x, step):
        return quantized_conv(**arrays | {"x": x, "filter_step": step}, **static)

    got = jax.jit(jax.vmap(fn, (0, None)))(x, arrays["filter_step"])
    for i in range(3):
        np.testing.assert_array_equal(got[i], fn(x[i], arrays["filter_step"]))
    jaxpr = jax.make_jaxpr(jax.vmap(fn, (0, None)))(x, arrays["filter_step"])
    assert [e.primitive for e in jaxpr.eqns].count(quantized_conv_p) == 1
    scales = np.stack([arrays["filter_step"] * k for k in (1, 2, 3)])
    got = jax.jit(jax.vmap(fn, (1, 0), 1))(np.moveaxis(x, 0, 1), scales)
    for i in range(3):
        np.testing.assert_array_equal(got[:, i], fn(x[i], scales[i]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((9, 5))}, r"x must be \[batch, length, cin\], got \(9, 5\)"),
        ({"u": jnp.ones((4, 6, 18))}, r"u must have shape \(4, 5, 18\) for F\(2,3\), 3 taps"),
        ({"point_step": jnp.ones(3)}, r"point_step must have shape \(4,\)"),
        ({"dilation": 2}, r"dilation 2 needs algorithm='direct', got F\(2,3\)"),
        ({"input_limit": 40000}, r"input_limit must lie in 1..32767 for F\(2,3\), got 40000"),
        ({"slope": 1.5}, r"slope must lie in \[0, 1\], got 1.5"),
        ({"taps": 4}, r"F\(2,3\) serves 1 to 3 taps, got 4"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(change, message):
    arrays, static = _case("F(2,3)", 3, 1, "int8")
    with pytest.raises(ValueError, match=message):
        quantized_conv(**(arrays | static) | change)
