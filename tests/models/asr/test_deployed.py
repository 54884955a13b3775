"""Deployed calls: the integers of training, and parts that are what their names say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.models.asr.acoustic import layer_algorithms
from cmjax.models.asr.deployed import backbone, backbone_call, network_call, whole_call
from cmjax.models.asr.dfsmn import ConvDFSMN, ConvDFSMNConfig
from cmjax.models.asr.features import LogMel, log_mel
from cmjax.models.asr.frames import Frames
from cmjax.models.asr.wav2letter import Wav2letter, Wav2letterConfig
from cmjax.primitives.convolution import calibrate

FRONT = LogMel(bands=8)


def _model(network: str):
    sizes = {"inputs": 8, "outputs": 4, "rngs": nnx.Rngs(0)}
    if network == "dfsmn":
        config = ConvDFSMNConfig(strides=(2,), width=8, hidden=12, blocks=1, lookback=2)
        return ConvDFSMN(config, **sizes)
    config = Wav2letterConfig(width=8, first_kernel=5, depth=1, kernel=5, wide_kernel=7, wide=12)
    return Wav2letter(config, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["dfsmn", "wav2letter"])
@pytest.mark.parametrize("precision", ["float32", "int8", "int8-winograd"])
def test_packed_calls_give_what_the_network_in_training_gives(network, precision):
    model = _model(network)
    speech = jax.random.normal(jax.random.key(1), (2, FRONT.samples(41))) * 0.1
    lengths = jnp.array([speech.shape[1], FRONT.samples(30)])
    features, frames = log_mel(speech, FRONT), FRONT.frames(lengths)
    inputs = []
    model(features, frames, watch=lambda conv, x, y: inputs.append(x.x))
    if precision != "float32":
        for conv, x, form in zip(
            model.convolutions(), inputs, layer_algorithms(model, precision, "fast"), strict=True
        ):
            padding = conv.padding(x.shape[1])
            kernel, stride = conv.kernel[...], conv.stride
            conv.set_scales(calibrate(x, kernel, algorithm=form, stride=stride, padding=padding))
        model.switch(precision)
    graph, state = nnx.split(model)
    wanted, counts = jax.jit(lambda s, *a: nnx.merge(graph, s)(*a))(state, features, frames)
    logits, found = network_call(model)(features, frames)
    exactly = {"rtol": 1e-5, "atol": 1e-5} if precision == "float32" else {"rtol": 0, "atol": 0}
    np.testing.assert_allclose(logits, wanted, **exactly)
    np.testing.assert_array_equal(found, counts)
    whole, _ = whole_call(model, FRONT)(speech, lengths)
    assert np.isfinite(np.asarray(whole)).all() and whole.shape == wanted.shape
    chosen = backbone(model)
    assert [model.convolutions()[i].taps for i in chosen] == ([5] if network == "dfsmn" else [5, 7])
    outputs = backbone_call(model)([inputs[i] for i in chosen])
    for i, out in zip(chosen, outputs, strict=True):
        x = inputs[i]
        at = Frames(x, jnp.full(2, x.shape[1]), jnp.zeros((), jnp.int32))
        np.testing.assert_allclose(out, model.convolutions()[i](at).x, rtol=1e-5, atol=1e-5)
    assert not any(hasattr(conv, "packed") for conv in model.convolutions())  # a copy was packed


def test_fast_takes_larger_tiles_than_auto():
    model = nnx.eval_shape(
        lambda: Wav2letter(Wav2letterConfig(), inputs=39, outputs=29, rngs=nnx.Rngs(0))
    )
    auto, fast = (layer_algorithms(model, "int8-winograd", name) for name in ("auto", "fast"))
    assert auto[1] == "N69" and fast[1] == "N88"
    assert fast[0] == fast[-1] == "direct"
