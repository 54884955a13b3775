"""The front end against Kaldi's own code (kaldi-native-fbank), and its bad inputs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import native
from cmjax.models.asr.features import LogMel, log_mel, mel_filters

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


OPTIONS = [
    {"sample_rate": 16000, "bands": 80},
    {},
    {"frame_s": 0.05},  # more than 512 points, an odd number of doublings
    {"shift_s": 0.03, "bands": 5},  # a shift longer than a frame
    {"frame_s": 0.0251, "shift_s": 0.007, "bands": 20},
    {"frame_s": 0.0004, "shift_s": 0.00026, "bands": 1, "low_hz": 0.0},
]


def _exact(samples: np.ndarray, options: LogMel) -> np.ndarray:
    """Mel energies in float64, one frame after the other."""
    before = np.concatenate([[0.0], samples[:-1]])
    n = np.arange(options.frame)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * n / (options.frame - 1))) ** 0.85
    out = []
    for t in range(int(options.frames(np.int64(len(samples))))):
        at = slice(t * options.shift, t * options.shift + options.frame)
        left = (1 - 0.97) * samples[at].mean()
        frame = window * (samples[at] - 0.97 * before[at] - left) * 32768
        power = np.abs(np.fft.rfft(frame, options.fft)) ** 2
        out.append(power @ mel_filters(options).astype(np.float64))
    return np.array(out)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_energies_equal_those_of_float64(options):
    options = LogMel(**options)
    rng = np.random.default_rng(0)
    samples = (0.2 + 0.1 * rng.normal(size=(2, options.samples(29)))).astype(np.float32)
    samples = np.pad(samples, ((0, 0), (0, 1)))  # one more, that is in no frame
    found = np.asarray(jax.jit(log_mel, static_argnums=1)(jnp.asarray(samples), options))
    for row, signal in zip(found, samples.astype(np.float64), strict=True):
        wanted = _exact(signal, options)
        # An error of 2**-24 in every factor of the transform's log2(points) steps, relative to the
        # loudest band: what leaks of the mean is far above the noise in the quiet ones.
        error = np.abs(np.exp(row) - wanted) / np.maximum(wanted, 1)
        assert error.max() < 2e-3 and np.median(error) < 1e-5


MEL_BITS = """
import sys, numpy as np, jax.numpy as jnp
sys.path.insert(0, {root!r})
from cmjax import native
from cmjax.models.asr.features import LogMel, mel_energies_p
from tests.models.asr.test_features import OPTIONS
assert native.status().isa == {isa!r}, native.status()
for options in map(lambda o: LogMel(**o), OPTIONS):
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(2, options.samples(29))).astype(np.float32)
    sys.stdout.write(np.asarray(mel_energies_p.bind(samples, options=options)).tobytes().hex())
"""


def test_kernels_of_every_instruction_set_give_the_same_energies():
    if native.status().isa in ("xla", "scalar"):
        pytest.skip(f"one kernel at most: {native.status().reason}")
    found = []
    for isa in ("scalar", "avx2"):
        done = subprocess.run(
            [sys.executable, "-c", MEL_BITS.format(root=str(Path(__file__).parents[3]), isa=isa)],
            env=os.environ | {"CMJAX_NATIVE_ISA": isa, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout)
    assert found[0] == found[1] and len(found[0]) > 1000


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
