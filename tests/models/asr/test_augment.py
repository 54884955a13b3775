"""Masks, vocal-tract warping, frequency responses: what they change and leave, and for whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.models.asr import augment
from cmjax.models.asr.augment import SpecAugment
from cmjax.models.asr.features import LogMel, band_centres

spec_augment = jax.jit(augment.spec_augment, static_argnums=3)
colour = jax.jit(augment.colour, static_argnums=(2, 3))
warp_vocal_tract = jax.jit(augment.warp_vocal_tract, static_argnums=(2, 3))
KEYS = jax.random.split(jax.random.key(0), 4)
LENGTHS = jnp.array([60, 40, 20, 60])


def _features():
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 60, 40)), jnp.float32)


def test_masks_are_stripes_of_the_mean_no_wider_than_asked():
    options = SpecAugment(band_masks=1, band_width=8, time_masks=1, time_width=5, time_share=1.0)
    x = _features()
    changed = np.asarray(spec_augment(KEYS, x, LENGTHS, options) != x)
    for row, length in zip(changed, LENGTHS, strict=True):
        assert not row[length:].any()
        bands, times = row[:length].all(axis=0), row.all(axis=1)
        assert bands.sum() <= 8 and times.sum() <= 5
        assert (row[:length] == (bands | times[:length, None])).all()
    assert changed.any()


def test_masked_values_are_the_mean_of_the_utterance_without_its_padding():
    options = SpecAugment(band_masks=4, band_width=20, time_masks=0)
    x = _features()
    out = np.asarray(spec_augment(KEYS, x, LENGTHS, options))
    mean = np.asarray(x[1, :40], np.float64).mean()
    masked = (out[1] != np.asarray(x[1])) & (np.arange(60) < 40)[:, None]
    assert masked.any()
    np.testing.assert_allclose(out[1][masked], mean, atol=1e-6)


def test_an_utterance_is_augmented_alike_in_any_batch():
    x, options = _features(), SpecAugment()
    together = spec_augment(KEYS, x, LENGTHS, options)
    alone = spec_augment(KEYS[2:3], x[2:3], LENGTHS[2:3], options)
    # The mean is a sum of 800 float32 numbers, in an order that may differ.
    np.testing.assert_allclose(together[2:3], alone, atol=1e-6)


def test_without_strength_nothing_changes():
    x = _features()
    none = SpecAugment(band_masks=0, time_masks=0, warp=0.0)
    np.testing.assert_array_equal(spec_augment(KEYS, x, LENGTHS, none), x)
    np.testing.assert_allclose(warp_vocal_tract(KEYS, x, LogMel(), 0.0), x, atol=1e-4)
    np.testing.assert_array_equal(colour(KEYS, x + 10, LogMel(), 0.0), x + 10)


def test_warping_moves_a_peak_by_its_factor_in_hertz():
    front = LogMel()
    hz = 700 * np.expm1(band_centres(front) / 1127)
    peak = np.exp(-(((hz - 1000) / 300) ** 2)).astype(np.float32)
    x = jnp.asarray(np.tile(peak, (50, 1, 1)))
    keys = jax.random.split(jax.random.key(1), 50)
    out = np.asarray(warp_vocal_tract(keys, x, front, 0.2))[:, 0]
    found = hz[out.argmax(axis=1)]
    spacing = np.diff(hz)[np.abs(hz[:-1] - 1000).argmin()]
    assert found.min() >= 1000 / 1.2 - spacing and found.max() <= 1000 / 0.8 + spacing
    assert found.max() - found.min() > 150


def test_a_frequency_response_is_one_smooth_curve_an_utterance_of_the_strength_asked_for():
    front, keys = LogMel(), jax.random.split(jax.random.key(2), 2000)
    x = jnp.full((2000, 3, 40), 20.0) + jnp.arange(3.0)[:, None]
    curves = np.asarray(colour(keys, x, front, 4.0) - x, np.float64)
    np.testing.assert_allclose(curves - curves[:, :1], 0, atol=1e-5)  # alike in every frame
    db = 10 / np.log(10) * curves[:, 0]
    # A curve's power has the spread of few normal numbers, so the mean of 2000 is 3 % from 16.
    assert np.square(db).mean() == pytest.approx(16.0, rel=0.1)
    np.testing.assert_allclose(db.mean(axis=1), 0, atol=1e-3)  # no change of level: that is gain
    ripples = np.abs(np.fft.rfft(np.concatenate([db, db[:, ::-1]], axis=1))).mean(axis=0)
    assert ripples[1:6].min() > 100 * ripples[6:].max()  # orders 1 to 5 and no finer ones
    alone = np.asarray(colour(keys[7:8], x[7:8], front, 4.0))
    np.testing.assert_allclose(alone[0], x[7] + curves[7], atol=1e-5)


def test_a_frequency_response_leaves_no_energy_below_the_floor():
    front = LogMel(floor=4.0)
    x = jnp.full((50, 2, 40), np.log(4.0), jnp.float32)
    out = np.asarray(colour(jax.random.split(jax.random.key(3), 50), x, front, 6.0))
    assert out.min() == pytest.approx(np.log(4.0)) and out.max() > 2.0


@pytest.mark.parametrize(
    "options", [{"warp": 1.0}, {"band_masks": -1}, {"response_db": -1.0}, {"time_share": 2.0}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="SpecAugment"):
        SpecAugment(**options)
