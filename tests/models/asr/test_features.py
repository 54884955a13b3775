"""The front end against Kaldi's own code (kaldi-native-fbank), and its bad inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.asr.features import LogMel, log_mel

knf = pytest.importorskip("kaldi_native_fbank")


def _kaldi(samples: np.ndarray, options: LogMel) -> np.ndarray:
    theirs = knf.FbankOptions()
    theirs.frame_opts.samp_freq = options.sample_rate
    theirs.frame_opts.dither = 0.0
    theirs.mel_opts.num_bins = options.bands
    fbank = knf.OnlineFbank(theirs)
    fbank.accept_waveform(options.sample_rate, (samples * 32768).tolist())
    fbank.input_finished()
    return np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])


@pytest.mark.parametrize("rate, bands, seconds", [(8000, 40, 1.0), (16000, 80, 0.73)])
def test_log_mel_equals_kaldi_native_fbank(rate, bands, seconds):
    rng = np.random.default_rng(0)
    time = np.arange(int(rate * seconds)) / rate
    wave = 0.1 + 0.2 * np.sin(2 * np.pi * 440 * time) + 0.05 * rng.normal(size=len(time))
    options = LogMel(sample_rate=rate, bands=bands)
    found = np.asarray(log_mel(jnp.asarray(wave, jnp.float32), options))
    wanted = _kaldi(wave.astype(np.float32), options)
    assert found.shape == wanted.shape
    # Two float32 FFTs of 512 points: relative error of an energy about 1e-5, where bands are not
    # empty; the tone's leakage makes the quietest bands 60 dB below the loudest.
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_batched_and_compiled_equals_one_by_one():
    waves = jnp.asarray(0.1 * np.random.default_rng(1).normal(size=(3, 2000)), jnp.float32)
    options = LogMel()
    together = jax.jit(log_mel, static_argnums=1)(waves, options)
    alone = jnp.stack([log_mel(wave, options) for wave in waves])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert together.shape == (3, options.frames(np.int64(2000)), 40)


def test_digital_silence_gives_the_floor():
    assert np.all(np.asarray(log_mel(jnp.zeros(1000), LogMel(floor=2.0))) == np.float32(np.log(2)))


@pytest.mark.parametrize("count, frames", [(199, 0), (200, 1), (279, 1), (280, 2)])
def test_only_whole_frames_count(count, frames):
    options = LogMel()
    assert options.frames(np.int64(count)) == frames
    assert frames == 0 or options.samples(frames) <= count < options.samples(frames + 1)


@pytest.mark.parametrize(
    "samples, error, message",
    [
        (jnp.zeros(199), ValueError, "at least one frame of 200, got 199"),
        (jnp.zeros(1000, jnp.int16), TypeError, "fractions of full scale, got int16"),
    ],
)
def test_bad_samples_are_refused(samples, error, message):
    with pytest.raises(error, match=message):
        log_mel(samples, LogMel())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bands": 200}, "too narrow"),
        ({"low_hz": 4000.0}, "low_hz must lie"),
        ({"frame_s": 1e-5}, "less than two"),
        ({"floor": 0.0}, "positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LogMel(**options)
