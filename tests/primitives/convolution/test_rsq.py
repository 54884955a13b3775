"""Fake quantization against float64 NumPy, its chosen derivative, and every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import PartitionSpec as P

from cmjax.primitives.convolution.rsq import lsq_gradient_scale, rounded, rsq_quantize
from cmjax.program import Size, trace

TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": jax.vmap,
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, r: (c, f(r)), 0, x)[1],
}


def _numpy(x, step, low, high):
    return np.clip(np.round(np.asarray(x, np.float64) / step), low, high) * step


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_equal_numpy_under_every_transformation(transform, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 16)) * 9, dtype)
    got = TRANSFORMS[transform](lambda r: rsq_quantize(r, 0.125, bits=7))(x)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), _numpy(x, 0.125, -63, 63))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(-6, 3), st.integers(0, 2**32 - 1))
def test_values_saturate_at_any_range_and_steps_may_vary_by_channel_or_tap(limit, exponent, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 4, 5)).astype(np.float32) * limit * 2.0**exponent
    per_tap = np.ldexp(1.0, rng.integers(exponent - 1, exponent + 2, (3, 1, 5)))
    got = rsq_quantize(x, per_tap, limit=limit)
    np.testing.assert_array_equal(got, _numpy(x, per_tap, -limit, limit))
    channels = per_tap[0, 0]
    got = rsq_quantize(x, channels, limit=(0, limit), axis=-1)
    np.testing.assert_array_equal(got, _numpy(x, channels, 0, limit))
    assert np.abs(np.asarray(got) / channels).max() <= limit


def test_halves_go_to_even():
    got = rsq_quantize(jnp.array([0.5, 1.5, 2.5, -0.5, -1.5]), 1.0)
    np.testing.assert_array_equal(got, [0, 2, 2, 0, -2])


def test_saturated_values_pass_no_gradient_and_others_all_of_it():
    x = jnp.array([-5.0, -1.01, -0.99, 0.1, 0.99, 1.01, 5.0])
    gradient = jax.grad(lambda x: rsq_quantize(x, 0.1, limit=10).sum())(x)
    np.testing.assert_array_equal(gradient, [0, 0, 1, 1, 1, 0, 0])


def test_the_steps_gradient_is_the_learned_step_size_rule():
    x = np.random.default_rng(0).normal(size=500).astype(np.float32)
    step, limit = 0.11, 10
    z = x / step
    want = np.where(np.abs(z) <= limit, np.round(z) - z, np.sign(z) * limit)
    _, tangent = jax.jvp(lambda s: rsq_quantize(x, s, limit=limit), (step,), (1.0,))
    np.testing.assert_allclose(tangent, want, rtol=1e-4, atol=2e-5)
    scaled = jax.grad(lambda s: rsq_quantize(x, s, limit=limit, gradient_scale=0.25).sum())(step)
    np.testing.assert_allclose(scaled, 0.25 * want.sum(), rtol=1e-4)
    assert lsq_gradient_scale(500, 10) == pytest.approx(1 / np.sqrt(5000))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_steps_gradient_is_the_integer_at_the_ends_of_the_range(dtype):
    """LSQ, equation 3: -Q where x / step <= -Q, and Q where it is >= Q."""
    x = jnp.array([63.5, -63.5, 63.0, 64.0], dtype)
    _, tangent = jax.jvp(lambda s: rsq_quantize(x, s), (jnp.float32(0.5),), (jnp.float32(1),))
    np.testing.assert_array_equal(tangent.astype(jnp.float32), [127, -127, 0, 127])
    gradient = jax.grad(lambda x: rsq_quantize(x, 0.5).sum())(x)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [1, 1, 1, 0])


@pytest.mark.parametrize("limit", [1, 7, 127, 2047])
def test_the_largest_value_is_at_the_end_of_the_step_that_covers_it(limit):
    """However step = max / limit and x * (1 / step) round."""
    x = np.random.default_rng(limit).normal(size=(200, 8)).astype(np.float32)
    top = np.abs(x).max(1, keepdims=True)
    step = jnp.asarray(top / np.float32(limit))
    gx, gstep = jax.grad(lambda x, s: rsq_quantize(x, s, limit=limit).sum(), (0, 1))(x, step)
    np.testing.assert_array_equal(gx, 1)
    z = x.astype(np.float64) / np.asarray(step)
    others = np.where(np.abs(x) == top, 0, np.rint(z) - z).sum(1, keepdims=True)
    at_end = np.where(np.abs(x) == top, limit * np.sign(x), 0).sum(1, keepdims=True)
    np.testing.assert_allclose(gstep, at_end + others, atol=1e-3 * np.sqrt(limit), rtol=1e-4)


def test_the_steps_gradient_agrees_with_differences_where_only_clipping_moves():
    """Far out every value saturates, y = +-step * limit is smooth in the step."""
    x = 20 * np.sign(np.random.default_rng(0).normal(size=50)).astype(np.float32)

    def loss(step):
        return (rsq_quantize(x, step, limit=7) * x).sum()

    difference = (loss(1.01) - loss(0.99)) / 0.02
    np.testing.assert_allclose(jax.grad(loss)(1.0), difference, rtol=1e-4)


def test_forward_and_reverse_mode_agree():
    rng = np.random.default_rng(1)
    x, dx, ct = rng.normal(size=(3, 4, 6)).astype(np.float32)
    step, dstep = rng.uniform(0.05, 0.2, (2, 6)).astype(np.float32)

    def fn(x, step):
        return rsq_quantize(x, step, limit=9, axis=-1)

    _, tangent = jax.jvp(fn, (x, step), (dx, dstep))
    gx, gstep = jax.vjp(fn, x, step)[1](ct)
    np.testing.assert_allclose(
        (ct * tangent).sum(), (gx * dx).sum() + (gstep * dstep).sum(), rtol=1e-5
    )


def test_second_derivatives_are_those_of_the_rule_not_of_the_staircase():
    x = jnp.array([0.3, 0.7])
    hessian = jax.hessian(lambda x: (rsq_quantize(x, 0.1) ** 2).sum())(x)
    np.testing.assert_allclose(hessian, 2 * np.eye(2), atol=1e-6)


def test_each_row_of_a_vmap_has_its_own_step_and_gradient():
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    steps = np.float32([0.1, 0.2, 0.4])
    fn = jax.jit(jax.vmap(jax.value_and_grad(lambda s, x: (rsq_quantize(x, s) ** 2).sum())))
    values, gradients = fn(steps, x)
    for i in range(3):
        value, gradient = jax.value_and_grad(lambda s, i=i: (rsq_quantize(x[i], s) ** 2).sum())(
            steps[i]
        )
        np.testing.assert_allclose((values[i], gradients[i]), (value, gradient), rtol=1e-6)


def test_sharded_rows_need_no_communication_and_shard_map_differentiates():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((16, 4)), jax.NamedSharding(mesh, P("data")))
    fn = jax.jit(lambda x, s: rsq_quantize(x, s, axis=-1))
    text = fn.lower(x, jnp.ones(4)).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "permute"))

    def local(x, s):
        return jax.lax.psum(rsq_quantize(x, s, axis=-1).sum(), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    got = jax.grad(mapped, (0, 1))(x, jnp.full(4, 0.3))
    want = jax.grad(lambda x, s: rsq_quantize(x, s, axis=-1).sum(), (0, 1))(x, jnp.full(4, 0.3))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_export_round_trip_with_a_symbolic_size():
    (n,) = export.symbolic_shape("n")
    fn = jax.jit(lambda x: rsq_quantize(x, 0.5, bits=4))
    exported = export.export(fn)(jax.ShapeDtypeStruct((n, 3), jnp.float32))
    x = np.linspace(-6, 6, 15, dtype=np.float32).reshape(5, 3)
    again = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x), _numpy(x, 0.5, -7, 7))


def test_it_is_one_operation_on_the_vector_cores():
    (n,) = export.symbolic_shape("n")
    program = trace(lambda x: rsq_quantize(x, 0.5), jax.ShapeDtypeStruct((n, 3), jnp.float32))
    (work,) = [op.work for op in program.operations if op.name == "cm_rsq_quantize"]
    assert work.column("vector_bytes") == Size.symbol("n") * (3 * 4.0 * 4)


def test_rounded_products_are_never_fused_with_a_sum():
    a, b, c = np.random.default_rng(0).normal(size=(3, 4096)).astype(np.float32)
    got = jax.jit(lambda a, b, c: rounded(a * b) + c)(a, b, c)
    np.testing.assert_array_equal(got, a * b + c)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: rsq_quantize(jnp.ones(3, int), 1.0),
            TypeError,
            "x must be floating point, got int",
        ),
        (
            lambda: rsq_quantize(jnp.ones(3), 0.0),
            ValueError,
            "step must be positive and finite; 1 of 1 is not",
        ),
        (lambda: rsq_quantize(jnp.ones(3), jnp.nan), ValueError, "1 of 1 is not"),
        (lambda: rsq_quantize(jnp.ones(3), jnp.array([1.0, -2, 1])), ValueError, "1 of 3 is not"),
        (
            lambda: rsq_quantize(jnp.ones(3), 1.0, bits=17),
            ValueError,
            r"bits must lie in 2..16, got 17",
        ),
        (
            lambda: rsq_quantize(jnp.ones(3), 1.0, bits=8, limit=3),
            ValueError,
            "bits or limit, not both",
        ),
        (lambda: rsq_quantize(jnp.ones(3), 1.0, limit=0), ValueError, "limit must be a positive"),
        (lambda: rsq_quantize(jnp.ones(3), 1.0, limit=(2, 5)), ValueError, "around zero"),
        (lambda: rsq_quantize(jnp.ones((2, 3)), jnp.ones(3)), ValueError, "name the axis"),
        (
            lambda: rsq_quantize(jnp.ones((2, 3)), jnp.ones(2), axis=1),
            ValueError,
            "as long as that axis",
        ),
        (lambda: lsq_gradient_scale(0, 3), ValueError, "are positive, got 0 and 3"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, error, message):
    with pytest.raises(error, match=message):
        build()
