"""The two networks: published sizes, the memory's formula, batches, streams and integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.conv import Conv
from cmjax.models.asr.dfsmn import ConvDFSMN, ConvDFSMNConfig, Memory
from cmjax.models.asr.frames import UNKNOWN, Frames
from cmjax.models.asr.wav2letter import Wav2letter, Wav2letterConfig
from cmjax.primitives.convolution import calibrate

BANDS, LABELS = 10, 5


def _networks() -> dict[str, AcousticModel]:
    tiny = Wav2letterConfig(width=8, first_kernel=6, kernel=5, depth=2, wide_kernel=7, wide=12)
    small = ConvDFSMNConfig(width=8, hidden=12, blocks=2, kernel=5, lookback_stride=2)
    sizes = {"inputs": BANDS, "outputs": LABELS}
    return {
        "wav2letter": Wav2letter(tiny, **sizes, rngs=nnx.Rngs(0)),
        "dfsmn": ConvDFSMN(small, **sizes, rngs=nnx.Rngs(0)),
    }


def _features(frames: int = 50):
    x = np.random.default_rng(0).normal(2.0, 1.5, size=(2, frames, BANDS))
    return jnp.asarray(x, jnp.float32), jnp.array([frames, frames - 17])


def _to_integers(model: AcousticModel, algorithms: dict[int, str]) -> None:
    """Calibrate on `_features`; kernels of these sizes take these algorithms, others direct."""
    features, lengths = _features()
    inputs = []
    model(features, lengths, watch=lambda conv, x, y: inputs.append(x.x))
    for conv, x in zip(model.convolutions(), inputs, strict=True):
        algorithm = algorithms.get(conv.taps, "direct") if conv.stride == 1 else "direct"
        padding = conv.padding(x.shape[1])
        conv.set_scales(
            calibrate(x, conv.kernel[...], algorithm=algorithm, stride=conv.stride, padding=padding)
        )
    model.switch("int8-winograd")


def test_wav2letter_has_the_size_that_arm_publishes():
    model = nnx.eval_shape(
        lambda: Wav2letter(Wav2letterConfig(), inputs=39, outputs=29, rngs=nnx.Rngs(0))
    )
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == 23_594_529
    assert model.macs_per_frame == 23_588_500


@pytest.mark.parametrize("frames", [1, 2, 7, 30])
def test_wav2letter_gives_half_the_frames_rounded_up(frames):
    model = _networks()["wav2letter"]
    logits, lengths = model(jnp.zeros((1, frames, BANDS)), jnp.array([frames]))
    assert logits.shape == (1, -(-frames // 2), LABELS) and lengths[0] == -(-frames // 2)


def test_macs_count_a_layer_as_often_as_it_runs_per_output_frame():
    model = _networks()["dfsmn"]
    front = 2 * (3 * BANDS * 8) + 3 * 8 * 8  # the first layer runs twice per output frame
    blocks = 2 * (5 * 8 * 12 + 12 * 8)
    assert model.macs_per_frame == front + blocks + 8 * LABELS


@pytest.mark.parametrize("frames, strides", [(7, (2, 2)), (3, (1, 2)), (60, (2, 1))])
def test_memory_equals_its_formula_in_loops(frames, strides):
    config = ConvDFSMNConfig(
        width=3,
        lookback=20,
        lookahead=20,
        lookback_stride=strides[0],
        lookahead_stride=strides[1],
    )
    memory = Memory(config, rngs=nnx.Rngs(0))
    p = np.random.default_rng(0).normal(size=(2, frames, 3))
    past, future = (np.asarray(w[...], np.float64) for w in (memory.past, memory.future))
    wanted = p.copy()
    for t in range(frames):
        for i in range(20):
            if t - strides[0] * i >= 0:
                wanted[:, t] += past[i] * p[:, t - strides[0] * i]
        for j in range(1, 21):
            if t + strides[1] * j < frames:
                wanted[:, t] += future[j - 1] * p[:, t + strides[1] * j]
    p = jnp.asarray(p, jnp.float32)
    found = memory(jnp.zeros_like(p), p, jnp.array([[0, frames]] * 2))
    # 41 products of float32, each below 10 in size
    np.testing.assert_allclose(found, wanted, atol=41 * 10 * 2**-23)


def test_convolution_equals_its_formula_in_loops():
    conv = Conv(3, 2, kernel=4, stride=2, slope=0.2, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.array([0.1, -0.2])
    x = np.random.default_rng(0).normal(size=(1, 9, 3))
    w, b = np.asarray(conv.kernel[...], np.float64), np.asarray(conv.bias[...], np.float64)
    wanted = np.tile(b, (5, 1))
    for t in range(5):
        for j in range(4):
            at = 2 * t - 1 + j
            if 0 <= at < 9:
                wanted[t] += x[0, at] @ w[j]
    wanted = np.maximum(wanted, 0.2 * wanted)
    frames = Frames(jnp.asarray(x, jnp.float32), jnp.array([9]), jnp.zeros((), int))
    np.testing.assert_allclose(conv(frames).x[0], wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["wav2letter", "dfsmn"])
def test_an_utterance_has_the_same_logits_in_a_batch_with_longer_ones(name):
    model = _networks()[name]
    features, lengths = _features()
    together, counts = model(features.at[1, 33:].set(99.0), lengths)
    alone, _ = model(features[1:, :33], lengths[1:])
    # Sums of float32 in another order, values of about 10.
    np.testing.assert_allclose(together[1, : counts[1]], alone[0], atol=1e-4)
    assert not np.asarray(together[1, counts[1] :]).any()


def _streamed(model: AcousticModel, features, lengths, chunks: int, known: bool):
    total = features.shape[1]
    size = model.chunk_multiple * chunks
    state, outputs = model.stream(batch=2), []
    count = -(-(total + model.latency * model.stride) // size)
    padded = jnp.pad(
        features, ((0, 0), (0, count * size - total), (0, 0)), constant_values=np.float32(99)
    )
    step = jax.jit(lambda state, x, lengths: model.step(state, x, lengths))
    for i in range(count):
        ended = (i + 1) * size >= int(lengths.min())
        given = lengths if known or ended else jnp.full(2, UNKNOWN)
        state, out = step(state, padded[:, i * size : (i + 1) * size], given)
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1)[:, model.latency :]


@pytest.mark.parametrize("name", ["wav2letter", "dfsmn"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_streaming_gives_the_logits_of_the_whole_utterance(name, chunks):
    model = _networks()[name]
    features, lengths = _features()
    whole, _ = jax.jit(lambda x, n: model(x, n))(features, lengths)
    streamed = _streamed(model, features, lengths, chunks, known=False)
    np.testing.assert_allclose(streamed[:, : whole.shape[1]], whole, atol=1e-4)


ALGORITHMS = {5: "F(3,3)+F(3,2)", 7: "F(3,4)+F(3,3)"}


@pytest.mark.parametrize("name", ["wav2letter", "dfsmn"])
def test_packed_and_streamed_integers_are_those_of_the_training_forward_pass(name):
    model = _networks()[name]
    features, lengths = _features()
    exact, _ = model(features, lengths)
    _to_integers(model, ALGORITHMS)
    trained, _ = jax.jit(lambda x, n: model(x, n))(features, lengths)
    power, noise = jnp.square(exact).sum(), jnp.square(trained - exact).sum()
    assert 10 * jnp.log10(power / noise) > 15  # it is the same network, coarser
    model.pack()
    deployed, _ = jax.jit(lambda x, n: model(x, n))(features, lengths)
    np.testing.assert_array_equal(deployed, trained)
    streamed = _streamed(model, features, lengths, 1, known=True)
    np.testing.assert_array_equal(streamed[:, : trained.shape[1]], trained)


def test_record_measures_error_and_saturation_of_a_layer():
    model = _networks()["wav2letter"]
    _to_integers(model, ALGORITHMS)
    features, lengths = _features()
    seen = []
    model(features, lengths, watch=lambda conv, x, y: seen.append((conv, x, y)))
    conv, x, y = seen[1]
    record = conv.record(x, y)
    conv.switch("float32")
    exact = np.asarray(conv(x).x, np.float64)
    np.testing.assert_allclose(record.power, np.square(exact).sum(), rtol=1e-5)
    np.testing.assert_allclose(record.error, np.square(np.asarray(y.x) - exact).sum(), rtol=1e-3)
    wide = conv.record(x, y)
    conv.point_step[...] = conv.point_step[...] / 50
    narrow = conv.record(x, y)
    assert narrow.excess > 10 * wide.excess and narrow.count == wide.count


@pytest.mark.parametrize(
    "precision, message",
    [("int4", "must be one of float32, int8, int8-winograd"), ("int8", "calibrate first")],
)
def test_switching_without_what_it_needs_is_refused(precision, message):
    with pytest.raises(ValueError, match=message):
        _networks()["dfsmn"].switch(precision)


def test_int8_does_not_take_the_scales_of_another_algorithm():
    model = _networks()["dfsmn"]
    _to_integers(model, ALGORITHMS)
    with pytest.raises(ValueError, match=r"int8 is direct convolution.*F\(3,3\)\+F\(3,2\)"):
        model.switch("int8")


def test_wrong_features_and_chunks_are_refused():
    model = _networks()["dfsmn"]
    with pytest.raises(ValueError, match="features must have 10 bands, got 9"):
        model(jnp.zeros((1, 8, 9)), jnp.array([8]))
    with pytest.raises(ValueError, match=r"multiple of \d+ frames, got 3"):
        model.step(model.stream(), jnp.zeros((1, 3, BANDS)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Wav2letterConfig(depth=0), "depth must be at least 1, got 0"),
        (lambda: ConvDFSMNConfig(strides=(2, 0)), "strides must be at least 1"),
        (lambda: ConvDFSMNConfig(lookahead=-1), "lookahead must be at least 0, got -1"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
