"""SpecAugment and vocal-tract warping: what they change, what they leave, and for whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.asr import augment
from models.asr.augment import SpecAugment
from models.asr.features import LogMel, band_centres

spec_augment = jax.jit(augment.spec_augment, static_argnums=3)
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


@pytest.mark.parametrize("options", [{"warp": 1.0}, {"band_masks": -1}, {"time_share": 2.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="SpecAugment"):
        SpecAugment(**options)
