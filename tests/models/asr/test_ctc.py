"""CTC against enumeration of every path."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.models.asr.ctc import (
    collapse,
    ctc_loss,
    greedy_decode,
    needed_frames,
    prefix_beam_decode,
)


def _by_enumeration(log_probabilities: np.ndarray) -> dict[tuple[int, ...], float]:
    """Probability of every label sequence: the sum over all paths that collapse to it."""
    frames, labels = log_probabilities.shape
    total: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(labels), repeat=frames):
        merged = [a for a, _ in itertools.groupby(path) if a != 0]
        chance = math.exp(sum(log_probabilities[t, label] for t, label in enumerate(path)))
        total[tuple(merged)] = total.get(tuple(merged), 0.0) + chance
    return total


def _random_log_probabilities(seed: int, frames: int, labels: int) -> np.ndarray:
    logits = 2 * np.random.default_rng(seed).normal(size=(frames, labels))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_prefix_beam_with_a_wide_beam_is_exact(seed, frames, labels):
    scores = _random_log_probabilities(seed, frames, labels)
    wanted = _by_enumeration(scores)
    found = prefix_beam_decode(scores, beam=10_000)
    assert {tuple(labels) for labels, _ in found} == set(wanted)
    for sequence, value in found:
        assert math.isclose(math.exp(value), wanted[tuple(sequence)], rel_tol=1e-9)
    best = max(wanted.values())
    assert math.isclose(math.exp(found[0][1]), best, rel_tol=1e-9)


def test_the_best_sequence_is_not_always_the_best_path():
    scores = np.log([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25]])
    assert greedy_decode(jnp.asarray(scores)[None], jnp.array([2])) == [[]]
    assert prefix_beam_decode(scores, beam=8)[0][0] == [1]


def test_loss_is_minus_the_log_of_the_enumerated_probability():
    scores = _random_log_probabilities(3, 5, 3)
    wanted = _by_enumeration(scores)
    for labels in ([1], [1, 2], [1, 1], [2, 1, 2]):
        padded = jnp.array([labels + [2] * (4 - len(labels))])
        loss = ctc_loss(jnp.asarray(scores)[None], jnp.array([5]), padded, jnp.array([len(labels)]))
        # optax works in float32 with log(0) replaced by -1e5.
        assert math.isclose(float(loss[0]), -math.log(wanted[tuple(labels)]), rel_tol=1e-5)


def test_loss_ignores_frames_and_labels_behind_the_ends():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 8, 4)))
    labels = jnp.array([[1, 2, 3], [3, 1, 1]])
    whole = ctc_loss(logits, jnp.array([6, 4]), labels, jnp.array([2, 1]))
    changed = logits.at[:, 6:].set(7.0)
    again = ctc_loss(changed, jnp.array([6, 4]), labels.at[:, 2].set(2), jnp.array([2, 1]))
    np.testing.assert_array_equal(whole, again)


def test_a_row_that_only_fills_a_batch_has_a_finite_loss_and_gradient():
    def loss(logits):
        return ctc_loss(logits, jnp.array([0]), jnp.zeros((1, 2), int), jnp.array([0])).sum()

    value, grad = jax.value_and_grad(loss)(jnp.ones((1, 3, 4)))
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("labels, frames", [([], 0), ([1, 2], 2), ([1, 1, 2, 2, 2], 8)])
def test_needed_frames_is_the_length_of_the_shortest_path(labels, frames):
    assert needed_frames(labels) == frames
    if labels:
        path = [labels[0]]
        for a, b in itertools.pairwise(labels):
            path += [0, b] if a == b else [b]
        assert len(path) == frames and collapse(path) == labels


def test_a_beam_below_one_is_refused():
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        prefix_beam_decode(np.zeros((2, 2)), beam=0)
