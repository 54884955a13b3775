"""Grouped and depthwise convolution, and inputs with a zero point, against XLA and int64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cmjax.primitives.convolution import (
    calibrate,
    choose_algorithm,
    int8_conv1d,
    prepack,
    winograd_conv1d,
)
from cmjax.program import trace

LAYOUT = ("NWC", "WIO", "NWC")


def arrays(groups, taps=3, length=30, cin=12, cout=24, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, cin)).astype(np.float32)
    return x, rng.normal(size=(taps, cin // groups, cout)).astype(np.float32)


def xlas(x, w, groups, stride=1, dilation=1, padding="SAME", dtype=None):
    return lax.conv_general_dilated(
        x,
        w,
        (stride,),
        padding,
        rhs_dilation=(dilation,),
        dimension_numbers=LAYOUT,
        feature_group_count=groups,
        preferred_element_type=dtype,
    )


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("groups", [1, 2, 3, 12])
@pytest.mark.parametrize("domain", ["float32", "int8", "int16"])
def test_every_stride_and_dilation_equals_xlas_grouped_convolution(
    domain, groups, stride, dilation
):
    x, w = arrays(groups, taps=4)
    y = winograd_conv1d(x, w, domain=domain, stride=stride, dilation=dilation, groups=groups)
    want = np.asarray(xlas(x, w, groups, stride, dilation))
    error = {"float32": 3e-6, "int8": 0.05, "int16": 0.003}[domain]
    assert np.abs(y - want).max() <= error * np.abs(want).max()


@pytest.mark.parametrize("groups", [2, 12])
@pytest.mark.parametrize("algorithm", ["F(2,3)", "F(4,3)", "N66"])
def test_short_algorithms_serve_groups(algorithm, groups):
    x, w = arrays(groups, taps=5 if algorithm == "N66" else 3)
    want = np.asarray(xlas(x, w, groups))
    exact = winograd_conv1d(x, w, algorithm=algorithm, groups=groups)
    np.testing.assert_allclose(exact, want, atol=2e-5 * np.abs(want).max())
    scales = calibrate(x, w, algorithm=algorithm, domain="int16", groups=groups)
    y = winograd_conv1d(x, w, scales=scales, groups=groups)
    assert np.abs(y - want).max() < 0.02 * np.abs(want).max()
    np.testing.assert_array_equal(winograd_conv1d(x, prepack(w, scales, groups=groups)), y)
    ready = prepack(w, algorithm=algorithm, groups=groups)
    np.testing.assert_allclose(winograd_conv1d(x, ready), exact, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("groups", [2, 4, 64])
def test_kernels_and_xla_give_groups_the_same_bits(groups):
    """2 and 4 groups of 16 or more channels run kernels, 64 run XLA; an export is XLA's always."""
    x, w = arrays(groups, cin=64, cout=128)
    fn = jax.jit(lambda x: winograd_conv1d(x, w, domain="int8", stride=2, groups=groups))
    np.testing.assert_array_equal(export.export(fn)(x).call(x), fn(x))


@pytest.mark.parametrize("groups", [3, 12])
def test_a_step_per_channel_belongs_to_the_channels_of_its_group(groups):
    x, w = arrays(groups)
    size = np.float32(10.0) ** np.arange(-3, 3).repeat(2)
    one = calibrate(x, w, algorithm="direct", groups=groups)
    steps = jnp.asarray(np.abs(x).max((0, 1)) / 127)
    several = type(one)(
        input_step=steps * size,
        point_step=one.point_step,
        filter_step=jnp.max(jnp.abs(w), (0, 1))[None] / 127,
        algorithm="direct",
        domain="int8",
        input_limit=127,
    )
    per_group = np.repeat(size.reshape(groups, -1).T, 24 // groups, 1)
    y = winograd_conv1d(x * size, w / per_group, groups=groups, scales=_fit(several, w, groups))
    want = np.asarray(xlas(x, w, groups))
    assert np.abs(y - want).max() < 0.05 * np.abs(want).max()


def _fit(scales, w, groups):
    """Filter steps for channels scaled by `input_step / max(input_step)`."""
    relative = (scales.input_step / scales.input_step.max()).reshape(groups, -1).T
    size = np.float32(10.0) ** np.arange(-3, 3).repeat(2)
    per_group = np.repeat(size.reshape(groups, -1).T, w.shape[2] // groups, 1)
    scaled = w / per_group * np.repeat(relative, w.shape[2] // groups, 1)
    step = jnp.max(jnp.abs(scaled), (0, 1))[None] / 127
    fields = {name: getattr(scales, name) for name in ("input_step", "point_step")}
    return type(scales)(
        **fields, filter_step=step, algorithm="direct", domain="int8", input_limit=127
    )


@pytest.mark.parametrize("zero_point", [-128, -100, 17, 127])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_integers_with_a_zero_point_are_convolved_exactly(zero_point, groups):
    """Against int64: sum of w (q - z) with q in -128..127, and zeros beyond the ends."""
    x, w = arrays(groups)
    scales = calibrate(
        x, w, algorithm="direct", input_limit=127, zero_point=zero_point, groups=groups
    )
    step = np.float32(scales.input_step)
    q = np.clip(np.rint(x * (np.float32(1) / step)) + zero_point, -128, 127).astype(np.int64)
    filter_step = np.asarray(scales.filter_step)[0]
    u = np.clip(np.rint(w * (np.float32(1) / filter_step)), -127, 127).astype(np.int64)
    with jax.enable_x64(True):
        sums = np.asarray(xlas(q - zero_point, u, groups, dtype=jnp.int64))
    want = sums.astype(np.float64) * step * filter_step
    y = np.asarray(winograd_conv1d(x, w, scales=scales, groups=groups))
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
    packed = prepack(w, scales, groups=groups)
    np.testing.assert_array_equal(winograd_conv1d(x, packed), y)
    exported = export.export(jax.jit(lambda x: winograd_conv1d(x, packed)))(x)
    np.testing.assert_array_equal(exported.call(x), y)


@pytest.mark.parametrize("algorithm", ["direct", "F(2,3)"])
def test_a_zero_point_halves_the_error_of_inputs_that_are_never_negative(algorithm):
    x, w = arrays(1, length=300)
    x = np.abs(x)
    want = np.asarray(xlas(x, w, 1))

    def error(zero_point):
        scales = calibrate(
            x, w, algorithm=algorithm, domain="int16", input_limit=127, zero_point=zero_point
        )
        return np.sqrt(np.mean((winograd_conv1d(x, w, scales=scales) - want) ** 2)), scales

    (plain, _), (asymmetric, scales) = error(0), error("auto")
    assert scales.zero_point == -128
    assert asymmetric < 0.65 * plain


def test_onnx_runtime_convolves_integers_with_a_zero_point_alike():
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    for groups, zero_point in ((1, 3), (3, 200), (12, 128)):
        x, w = arrays(groups)
        scales = calibrate(
            x, w, algorithm="direct", zero_point=zero_point - 128, groups=groups, input_limit=127
        )
        step, filter_step = np.float32(scales.input_step), np.asarray(scales.filter_step)[0]
        q = np.clip(np.rint(x / step) + zero_point, 0, 255).astype(np.uint8)
        u = np.clip(np.rint(w / filter_step), -127, 127).astype(np.int8)
        tensors = {"z": np.uint8(zero_point), "wz": np.int8(0), "w": u.transpose(2, 1, 0)}
        graph = helper.make_graph(
            [
                helper.make_node(
                    "ConvInteger", ["x", "w", "z", "wz"], ["y"], group=groups, pads=[1, 1]
                )
            ],
            "conv",
            [helper.make_tensor_value_info("x", kinds.UINT8, [2, 12, 30])],
            [helper.make_tensor_value_info("y", kinds.INT32, [2, 24, 30])],
            [onnx.numpy_helper.from_array(np.ascontiguousarray(t), n) for n, t in tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        (sums,) = session.run(None, {"x": np.ascontiguousarray(q.transpose(0, 2, 1))})
        want = sums.transpose(0, 2, 1).astype(np.float64) * step * filter_step
        y = winograd_conv1d(x, w, scales=scales, groups=groups)
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("groups", [3, 12])
def test_gradients_are_those_of_the_grouped_convolution(groups):
    x, w = arrays(groups)
    ct = np.random.default_rng(1).normal(size=(2, 30, 24)).astype(np.float32)
    scales = calibrate(x, w, algorithm="direct", method="max", zero_point=-3, groups=groups)

    def loss(x, w):
        return (winograd_conv1d(x, w, scales=scales, groups=groups) * ct).sum()

    want = jax.grad(lambda x, w: (xlas(x, w, groups) * ct).sum(), (0, 1))(x, w)
    for got, exact in zip(jax.grad(loss, (0, 1))(x, w), want, strict=True):
        off = np.abs(got - exact) > 0.05 * np.abs(exact).max()
        assert off.mean() < 0.05  # the ends of the range pass none


def test_it_maps_over_signals_and_filters_and_shards_without_collectives():
    x, w = arrays(3)

    def fn(x, w):
        return winograd_conv1d(x, w, domain="int8", algorithm="F(2,3)", groups=3)

    np.testing.assert_array_equal(jax.vmap(fn, (None, 0))(x, w[None])[0], fn(x, w))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jnp.tile(x, (4, 1, 1))
    scales = calibrate(x, w, algorithm="F(2,3)", groups=3)
    ready = prepack(w, scales, groups=3)
    sharded = jax.device_put(np.asarray(rows), NamedSharding(mesh, P("data")))
    step = jax.jit(lambda x: winograd_conv1d(x, ready))
    assert "all-" not in step.lower(sharded).compile().as_text()
    np.testing.assert_array_equal(step(sharded), winograd_conv1d(rows, ready))


def test_a_group_divides_the_products_and_depthwise_ones_run_on_the_vector_cores():
    def work(groups):
        x, w = arrays(groups, cin=64, cout=64)
        scales = calibrate(x, w, algorithm="direct", groups=groups)
        program = trace(lambda x, p: winograd_conv1d(x, p), x, prepack(w, scales, groups=groups))
        (one,) = (op.work for op in program.operations if "conv" in op.name)
        return {f: float(one.column(f).evaluate({})) for f in ("cube_flops_8bit", "flops")}

    one, four, depthwise = (work(groups) for groups in (1, 4, 64))
    assert four["cube_flops_8bit"] == one["cube_flops_8bit"] / 4
    assert depthwise["cube_flops_8bit"] == 0
    assert depthwise["flops"] == one["flops"] / 64


@pytest.mark.parametrize("domain", ["float32", "int8", "int16"])
@pytest.mark.parametrize("shape", [(0, 30), (2, 0)])
def test_no_signals_and_empty_ones_give_empty_results(domain, shape):
    w = arrays(1)[1]
    x = jnp.zeros((*shape, 12))
    y = winograd_conv1d(x, w, domain=domain, padding=(1, 1) if shape[1] else (1, 2))
    assert y.shape == (*shape[:1], 30 if shape[1] else 1, 24)
    assert not np.isnan(y).any()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda x, w: winograd_conv1d(x, w, groups=5), "groups=5 must divide the channels"),
        (lambda x, w: winograd_conv1d(x, w, groups=0), "groups must be an integer of at least 1"),
        (
            lambda x, w: int8_conv1d(x, w, groups=4),
            r"\[taps, 3, cout\] for x with 12 channels in 4",
        ),
        (lambda x, w: prepack(w, groups=7), "groups=7 must divide"),
        (
            lambda x, w: calibrate(x, w, groups=3, zero_point=128, input_limit=127),
            r"zero_point must lie in -128\.\.127, the integers of the input, got 128",
        ),
        (
            lambda x, w: jax.jit(lambda x: calibrate(x, w, groups=3, zero_point="auto"))(x),
            "zero_point='auto' needs samples that are known",
        ),
        (
            lambda x, w: winograd_conv1d(x, prepack(w, groups=3), groups=1),
            "packed with groups=3, and 1 was asked for",
        ),
        (
            lambda x, w: prepack(w, calibrate(x, w, groups=3), groups=3, packed=True),
            "packed=True is for one group, got groups=3",
        ),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, message):
    with pytest.raises(ValueError, match=message):
        build(*arrays(3))


def test_few_channels_of_a_group_stay_direct():
    assert choose_algorithm(3, 1, 1, domain="int8") == "direct"
    _, w = arrays(12)
    assert prepack(w, groups=12).plan.algorithm == "direct"
