"""Convolutions against XLA's, training against deployment, and every transformation of JAX."""

import dataclasses

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from cmjax.primitives.convolution import calibrate
from cmjax.primitives.convolution.choice import FLOOR_DB, choose_algorithm, expected_sqnr_db
from cmjax.primitives.convolution.packed import prepack
from cmjax.primitives.convolution.toom_cook import ALGORITHMS, supported
from cmjax.primitives.convolution.winograd import int8_conv1d, winograd_conv1d
from cmjax.program import trace

LEARNED = ("input_step", "point_step", "filter_step")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def _conv(x, w, stride=1, padding="SAME", dilation=1):
    padding = padding if isinstance(padding, str) else [padding]
    return lax.conv_general_dilated(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(w, jnp.float32),
        (stride,),
        padding,
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision="highest",
    )


def _data(taps, cin=6, cout=5, batch=2, length=20, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, cin)).astype(np.float32)
    return x, rng.normal(size=(taps, cin, cout)).astype(np.float32) / np.float32(
        (taps * cin) ** 0.5
    )


def _sqnr_db(want, got):
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    noise = ((got - want) ** 2).sum()
    return np.inf if noise == 0 else 10 * np.log10((want**2).sum() / noise)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_float32_equals_xla_for_every_algorithm_and_odd_lengths(algorithm):
    form = ALGORITHMS[algorithm]
    taps = form.r if form.r != form.m else 2 * form.r + 1
    x, w = _data(taps, length=7 * form.m - 3)
    got = jax.jit(lambda x, w: winograd_conv1d(x, w, algorithm=algorithm))(x, w)
    want = _conv(x, w)
    # rounding noise of float32, amplified in power; five of its standard deviations
    noise = 2.0**-24 * (2 * form.amplification(taps)) ** 0.5 * np.std(want)
    np.testing.assert_allclose(got, want, atol=5 * 3 * noise)


@settings(max_examples=8, deadline=None)
@given(
    taps=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.integers(1, 3),
    padding=st.sampled_from(["SAME", "SAME_LOWER", "VALID", (2, 3), (-1, 4)]),
    dilation=st.sampled_from([1, 1, 2]),
    length=st.integers(12, 30),
    domain=st.sampled_from(["float32", "int16"]),
)
def test_any_stride_padding_and_dilation_equals_xla(
    taps, stride, padding, dilation, length, domain
):
    x, w = _data(taps, length=length)
    got = winograd_conv1d(x, w, stride=stride, padding=padding, dilation=dilation, domain=domain)
    want = _conv(x, w, stride, padding, dilation)
    assert got.shape == want.shape
    assert _sqnr_db(want, got) > (100 if domain == "float32" else 40)


@pytest.mark.parametrize(
    ("taps", "domain"), [(5, "float32"), (3, "int8"), (7, "int16"), (32, "int8")]
)
def test_the_chosen_algorithm_keeps_the_accuracy_it_promises(taps, domain):
    x, w = _data(taps, cin=64, cout=64, length=160)
    name = choose_algorithm(taps, 64, 64, domain=domain)
    assert name != "direct"
    scales = None
    if domain != "float32":
        scales = calibrate(x, w, domain=domain, pair_rule=False)
        assert scales.algorithm == name
    got = jax.jit(lambda x, w: winograd_conv1d(x, w, scales=scales))(x, w)
    assert _sqnr_db(_conv(x, w), got) > FLOOR_DB[domain]


@pytest.mark.parametrize("domain", ["int8", "int16"])
@pytest.mark.parametrize("algorithm", ["direct", "F(2,3)", "F(4,3)", "F(6,3)", "F(3,3)+F(3,2)"])
def test_measured_accuracy_is_what_the_closed_form_expects(algorithm, domain):
    taps = ALGORITHMS[algorithm].r + (algorithm == "direct") * 4
    x, w = _data(taps, cin=48, cout=24, length=150, seed=1)
    scales = calibrate(x, w, algorithm=algorithm, domain=domain, pair_rule=False)
    got = jax.jit(lambda x, w: winograd_conv1d(x, w, scales=scales))(x, w)
    measured, expected = _sqnr_db(_conv(x, w), got), expected_sqnr_db(algorithm, taps, domain)
    assert -1 < measured - expected < 2.5


@pytest.mark.parametrize(
    ("algorithm", "domain"),
    [
        ("direct", "int8"),
        ("F(2,3)", "int8"),
        ("F(4,3)", "int16"),
        ("F(4,3)-lavin", "int8"),
        ("F(3,3)+F(3,2)", "int8"),
        ("N44", "int16"),
        ("F(4,4)", "int8"),
    ],
)
def test_the_training_forward_pass_is_the_deployed_convolution_bit_for_bit(algorithm, domain):
    form = ALGORITHMS[algorithm]
    rng = np.random.default_rng(3)
    taps = form.r if algorithm != "F(4,4)" else 7
    x, w = _data(taps, cin=int(rng.integers(1, 9)), cout=int(rng.integers(1, 20)), seed=2)
    bias = rng.normal(size=w.shape[2]).astype(np.float32)
    stride = 2 if algorithm == "F(2,3)" else 1
    options = {"padding": (3, 1), "activation": 0.2}
    scales = calibrate(x, w[: form.r], algorithm=algorithm, domain=domain, method="max")
    if stride == 2:
        w = np.concatenate([w, w])  # six taps fold to three
        scales = calibrate(x, w, algorithm=algorithm, domain=domain, stride=2, method="max")
    # learned steps are any numbers
    scales = jax.tree.map(lambda s: s * rng.uniform(0.7, 1.3, s.shape).astype(np.float32), scales)

    @jax.jit
    def loss(x, w, scales, bias):
        y = winograd_conv1d(x, w, scales=scales, bias=bias, stride=stride, **options)
        return (y**2).sum(), y

    (_, trained), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(
        x, w, scales, bias
    )
    packed = prepack(w, scales, stride=stride)
    deployed = jax.jit(lambda p, x, b: winograd_conv1d(x, p, bias=b, **options))(packed, x, bias)
    np.testing.assert_array_equal(trained, deployed)
    assert np.std(trained) > 0
    plain = prepack(w, scales, stride=stride, packed=False)
    np.testing.assert_array_equal(winograd_conv1d(x, plain, bias=bias, **options), deployed)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    of_scales = gradients[2]
    learned = [*gradients[:2], of_scales.point_step, of_scales.filter_step, gradients[3]]
    assert all(np.abs(g).max() > 0 for g in learned)
    # a fine input range is no quantizer to learn
    assert (of_scales.input_step == 0) == (scales.input_limit > 2047)


def test_an_input_step_per_channel_serves_channels_of_very_different_size():
    x, w = _data(3, cin=16, cout=8, length=120)
    gains = np.float32(2.0) ** np.arange(16)
    x, w = x * gains, w / gains[:, None]
    scales = calibrate(x, w, algorithm="F(2,3)", pair_rule=False)
    common = _sqnr_db(_conv(x, w), winograd_conv1d(x, w, scales=scales))
    relative = jnp.asarray(gains / gains.max())
    even = calibrate(x / relative, w * relative[:, None], algorithm="F(2,3)", pair_rule=False)
    # The filter is scaled against the steps.
    scales = dataclasses.replace(even, input_step=even.input_step * relative)
    own = winograd_conv1d(x, w, scales=scales)
    assert _sqnr_db(_conv(x, w), own) > 33 > common + 15
    np.testing.assert_array_equal(winograd_conv1d(x, prepack(w, scales)), own)


def test_a_filter_transformed_beforehand_gives_the_same_in_float32():
    for taps, stride, algorithm in ((5, 1, "auto"), (6, 2, "F(2,3)"), (3, 1, "direct")):
        x, w = _data(taps, cin=32, cout=32, length=31)
        packed = prepack(w, algorithm=algorithm, stride=stride)
        got = jax.jit(winograd_conv1d)(x, packed)
        assert _sqnr_db(_conv(x, w, stride), got) > 110
    with pytest.raises(ValueError, match="packed with domain='float32', and 'int8' was asked for"):
        winograd_conv1d(x, packed, domain="int8")
    with pytest.raises(ValueError, match=r"scales are of F\(2,3\) in int8, and F\(4,3\) in int8"):
        prepack(w, calibrate(x, w, algorithm="F(2,3)"), algorithm="F(4,3)")


def test_float32_derivatives_agree_with_differences():
    x, w = _data(5, cin=2, cout=3, batch=1, length=9)
    fn = jax.jit(lambda x, w: winograd_conv1d(x, w, algorithm="F(2,5)", padding=(1, 3), stride=1))
    check_grads(fn, (x, w), order=1, modes=["fwd", "rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("domain", ["float32", "int8"])
def test_jit_of_vmap_of_grad_equals_a_loop(domain):
    x, w = _data(3, batch=3)
    xs = np.stack([x, 2 * x, -x])
    scales = None if domain == "float32" else calibrate(xs[1], w, algorithm="F(4,3)")

    def loss(w, x):
        return (winograd_conv1d(x, w, scales=scales, algorithm="F(4,3)", domain=domain) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    want = np.stack([gradient(w, x) for x in xs])
    got = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(w, xs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    ws = np.stack([w, w / 2, 2 * w])
    each = jax.jit(jax.vmap(jax.grad(loss)))(ws, xs)
    np.testing.assert_allclose(each[1], gradient(ws[1], xs[1]), rtol=1e-5, atol=1e-4)


def test_scan_and_remat_give_the_same_numbers():
    x, w = _data(3, cin=6, cout=6)
    scales = calibrate(x, w, algorithm="F(2,3)")

    def layer(h):
        return winograd_conv1d(h, w, scales=scales, activation="relu")

    def deep(x):
        return lax.scan(lambda h, _: (jax.checkpoint(layer)(h), None), x, length=3)[0]

    want = layer(layer(layer(x)))
    np.testing.assert_array_equal(jax.jit(deep)(x), want)
    plain = jax.jit(jax.grad(lambda x: layer(layer(layer(x))).sum()))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: deep(x).sum()))(x), plain, atol=1e-5)


def test_a_layer_of_nnx_learns_its_scales_with_its_weights():
    x, w = _data(3)
    scales = calibrate(x, w, algorithm="F(2,3)", input_limit=20)
    scales = dataclasses.replace(scales, input_step=scales.input_step * 2)

    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.asarray(w))
            for key in LEARNED:
                setattr(self, key, nnx.Param(getattr(scales, key)))

        def __call__(self, x):
            learned = {key: getattr(self, key)[...] for key in LEARNED}
            return winograd_conv1d(x, self.w[...], scales=dataclasses.replace(scales, **learned))

    layer = Layer()
    optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    target = _conv(x, w)

    @nnx.jit
    def step(layer, optimizer):
        value, gradients = nnx.value_and_grad(lambda m: ((m(x) - target) ** 2).mean())(layer)
        optimizer.update(layer, gradients)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("domain", ["float32", "int8"])
def test_batch_and_output_features_shard_without_collectives(domain):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, w = _data(7, cin=8, cout=32, batch=8, length=50)
    named = jax.NamedSharding(mesh, P("data"))
    by_feature = jax.NamedSharding(mesh, P(None, None, "model"))
    if domain == "float32":
        operand = jax.device_put(w, by_feature)
    else:
        operand = prepack(w, calibrate(x, w, algorithm="N69"), packed=False)
        placed = {
            "u": jax.device_put(operand.u, by_feature),
            "filter_step": jax.device_put(
                operand.filter_step, jax.NamedSharding(mesh, P(None, "model"))
            ),
        }
        operand = dataclasses.replace(operand, **placed)
    options = {"algorithm": "N69"} if domain == "float32" else {}
    fn = jax.jit(lambda x, w: winograd_conv1d(x, w, **options))
    args = jax.device_put(x, named), operand
    text = fn.lower(*args).compile().as_text()
    assert not [word for word in COLLECTIVES if word in text]
    got = fn(*args)
    assert got.sharding.spec == P("data", None, "model")
    alone = winograd_conv1d(x, jax.device_get(operand), **options)
    np.testing.assert_allclose(got, alone, rtol=1e-4, atol=1e-4)


def test_shard_map_differentiates_data_parallel_training():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = _data(3, batch=8)
    scales = calibrate(x, w, algorithm="F(4,3)")

    def local(w, scales, x):
        y = winograd_conv1d(x, w, scales=scales)
        return lax.psum((y**2).sum(), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    got = jax.block_until_ready(jax.jit(jax.grad(mapped, (0, 1)))(w, scales, x))

    def alone(w, scales):
        return (winograd_conv1d(x, w, scales=scales) ** 2).sum()

    want = jax.jit(jax.grad(alone, (0, 1)))(w, scales)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("domain", ["float32", "int8"])
def test_export_round_trip_with_symbolic_batch_and_length(domain):
    x, w = _data(3)
    batch, length = export.symbolic_shape("b, t")
    given = jax.ShapeDtypeStruct((batch, length, 6), jnp.float32)
    if domain == "float32":
        fn = jax.jit(lambda x: winograd_conv1d(x, w, algorithm="F(4,3)"))
    else:
        packed = prepack(w, calibrate(x, w, algorithm="F(4,3)"))
        fn = jax.jit(lambda x: winograd_conv1d(x, packed, activation="relu"))
    again = export.deserialize(export.export(fn)(given).serialize())
    # the whole program is XLA's there, and sums in float32 may be fused differently
    np.testing.assert_allclose(again.call(x), fn(x), atol=1e-5)


def test_winograd_moves_work_from_the_cube_to_the_vector_cores():
    batch, length = export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((batch, length, 256), jnp.float32)
    sample, w = _data(5, cin=256, cout=256, length=40)

    def work(algorithm, domain):
        if domain == "float32":
            program = trace(lambda x, w: winograd_conv1d(x, w, algorithm=algorithm), x, w)
        else:
            packed = prepack(w, calibrate(sample, w, algorithm=algorithm, domain=domain))
            program = trace(lambda x, p: winograd_conv1d(x, p), x, packed)
        ops = [op for op in program.operations if "conv" in op.name]
        assert len(ops) == 1
        values = {"b": 4.0, "t": 1000.0}
        fields = ("cube_flops_8bit", "cube_flops_16bit", "cube_flops_32bit", "vector_bytes")
        return {f: float(ops[0].work.column(f).evaluate(values)) for f in fields}

    macs = 4 * 1000 * 5 * 256 * 256
    for domain, field in (("int8", "8bit"), ("int16", "16bit"), ("float32", "32bit")):
        direct, fast = work("direct", domain), work("F(4,5)", domain)
        assert direct[f"cube_flops_{field}"] == pytest.approx(2 * macs)
        assert fast[f"cube_flops_{field}"] == pytest.approx(2 * macs / 2.5)
        assert fast["vector_bytes"] > 2 * direct["vector_bytes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_in_gives_half_precision_out(dtype):
    x, w = _data(3)
    for options in ({}, {"domain": "int8"}):
        got = winograd_conv1d(jnp.asarray(x, dtype), jnp.asarray(w, dtype), **options)
        assert got.dtype == dtype
        assert _sqnr_db(_conv(x, w), got) > 28


def test_int8_conv1d_is_the_direct_algorithm():
    x, w = _data(4)
    got = int8_conv1d(x, w, dilation=2, activation="relu")
    want = winograd_conv1d(x, w, algorithm="direct", domain="int8", dilation=2, activation="relu")
    np.testing.assert_array_equal(got, want)
    assert _sqnr_db(jnp.maximum(_conv(x, w, dilation=2), 0), got) > 34


def test_every_filter_length_is_served():
    for taps in (3, 5, 7, 32):
        assert any(ALGORITHMS[name].saving(taps) >= 1.75 for name in supported(taps))
