"""Calibration of a network: which algorithm where, and what each way of choosing ranges costs."""

import jax
import numpy as np
import pytest
from flax import nnx

from cmjax.models.asr.acoustic import layer_algorithms
from cmjax.models.asr.conv import Scale
from cmjax.models.asr.features import LogMel
from cmjax.models.asr.plans import restore_plans, saved_plans
from cmjax.models.asr.text import Alphabet
from cmjax.models.asr.wav2letter import Wav2letter, Wav2letterConfig
from train.asr.learner import features_of
from train.asr.quantize import calibrate, layer_sqnr_db
from train.data.batches import Batch, Framing

FRAMING = Framing(LogMel(), Alphabet("words", ("a", "b")), stride=2)


def _model() -> Wav2letter:
    config = Wav2letterConfig(width=16, first_kernel=5, kernel=5, depth=1, wide_kernel=7, wide=16)
    model = Wav2letter(config, inputs=40, outputs=3, rngs=nnx.Rngs(0))
    features, _ = features_of(_batch(), FRAMING)
    model.set_statistics(features.mean((0, 1)), features.std((0, 1)))
    return model


def _batch() -> Batch:
    wave = np.random.default_rng(0).normal(0, 0.1, (2, 8000)).astype(np.float32)
    lengths = np.array([8000, 6000], np.int32)
    return Batch(wave, lengths, np.ones((2, 2), np.int32), np.ones(2, np.int32))


@pytest.fixture(scope="module")
def noise():
    """SQNR of every layer by way of quantizing, dB; F(4,4) enlarges inputs 40 times."""
    found = {}
    for precision, ranges in (
        ("int8", "per-tap"),
        ("int8-winograd", "per-tap"),
        ("int8-winograd", "naive"),
    ):
        model = _model()
        calibrate(model, [_batch()], FRAMING, precision, algorithm="F(4,4)", ranges=ranges)
        found[precision, ranges] = layer_sqnr_db(model, [_batch()], FRAMING)
    return found


@pytest.mark.slow
def test_direct_int8_is_most_exact_and_naive_winograd_loses_most(noise):
    direct = noise["int8", "per-tap"]
    tapped, naive = noise["int8-winograd", "per-tap"], noise["int8-winograd", "naive"]
    for layer in (1, 2):  # those with a short algorithm
        assert direct[layer] > tapped[layer] > naive[layer] + 3
    assert direct[0] == tapped[0] == naive[0]  # the same direct layer on the same input


def test_only_layers_with_taps_and_no_stride_take_a_short_algorithm():
    model = _model()
    forms = layer_algorithms(model, "int8-winograd", "F(3,3)")
    assert forms == ["direct", "F(3,3)", "F(3,3)", "direct", "direct"]
    assert set(layer_algorithms(model, "int8", "F(3,3)")) == {"direct"}


def test_auto_takes_a_short_algorithm_where_there_are_channels_enough():
    wide = nnx.eval_shape(
        lambda: Wav2letter(Wav2letterConfig(), inputs=39, outputs=29, rngs=nnx.Rngs(0))
    )
    forms = layer_algorithms(wide, "int8-winograd")
    assert [form == "direct" for form in forms] == [True] + 8 * [False] + [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("ranges", ["per-tap", "scaled", "naive"])
def test_which_steps_learn_is_a_matter_of_the_ranges(ranges):
    model = _model()
    calibrate(model, [_batch()], FRAMING, "int8-winograd", algorithm="F(3,3)", ranges=ranges)
    conv = model.convolutions()[1]
    learned = nnx.to_pure_dict(nnx.state(conv, Scale))
    points = {"per-tap": (5,), "naive": ()}
    assert {name: step.shape for name, step in learned.items()} == {
        "input_step": (),
        "filter_step": () if ranges == "naive" else (5, 16),
        **({"point_step": points[ranges]} if ranges in points else {}),
    }
    assert conv.scales.point_step.shape == (5,) and conv.scales.filter_step.shape == (5, 16)
    assert (conv.scales.point_step == 1).all() == (ranges == "scaled")
    again = _model()
    restore_plans(again, saved_plans(model))
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))


@pytest.mark.slow
def test_scaled_ranges_are_no_worse_than_safe_ones():
    found = {}
    for ranges in ("safe", "scaled"):
        model = _model()
        calibrate(model, [_batch()], FRAMING, "int8-winograd", algorithm="F(3,3)", ranges=ranges)
        found[ranges] = layer_sqnr_db(model, [_batch()], FRAMING)
        limits = [conv.input_limit for conv in model.convolutions()]
        assert all(1 <= limit <= 127 for limit in limits)
    assert found["scaled"][1] >= found["safe"][1] - 0.01


def test_plans_make_a_new_model_like_the_old_one():
    model = _model()
    calibrate(model, [_batch()], FRAMING, "int8-winograd", algorithm="F(3,3)")
    again = _model()
    restore_plans(again, saved_plans(model))
    for old, new in zip(model.convolutions(), again.convolutions(), strict=True):
        assert (old.algorithm, old.input_limit, old.precision) == (
            new.algorithm,
            new.input_limit,
            new.precision,
        )
        assert new.scales.filter_step.shape == old.scales.filter_step.shape


def test_an_algorithm_without_a_safe_integer_is_refused():
    form = "F(3,4)+F(3,3)"
    with pytest.raises(ValueError, match="no integer is safe"):
        calibrate(_model(), [_batch()], FRAMING, "int8-winograd", algorithm=form, ranges="safe")


@pytest.mark.parametrize(
    "algorithm, message",
    [("F(9,9)", "is not one of auto, "), ("F(2,3)", "serves 1 to 3 taps, got 5")],
)
def test_an_algorithm_that_does_not_fit_is_refused(algorithm, message):
    with pytest.raises(ValueError, match=message):
        layer_algorithms(_model(), "int8-winograd", algorithm)
