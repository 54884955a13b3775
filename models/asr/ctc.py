"""Connectionist temporal classification: loss and decoding (Graves et al., 2006).

    p(labels | x) = sum over frame paths that collapse to labels of prod_t p(path_t | x)

A path collapses by merging repeats, then dropping blanks (label 0).
"""

import collections
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from cmjax.models.asr.text import BLANK


def ctc_loss(
    logits: Float[Array, "batch frames labels"],
    frames: Int[Array, "batch"],
    labels: Int[Array, "batch most"],
    counts: Int[Array, "batch"],
) -> Float[Array, "batch"]:
    """-ln p(labels | x) of every utterance.

    Args:
      logits: before the softmax.
      frames: how many frames of `logits` are the utterance's.
      labels: without blanks, padded behind `counts` by anything.
      counts: how many labels.

    Labels that need more frames than there are (`needed_frames`) have probability 0; refuse them
    beforehand, their loss is a large finite number here.
    """
    beyond = jnp.arange(logits.shape[1]) >= frames[:, None]
    unlabelled = jnp.arange(labels.shape[1]) >= counts[:, None]
    return optax.ctc_loss(logits, beyond.astype(logits.dtype), labels, unlabelled.astype(float))


def needed_frames(labels: Sequence[int]) -> int:
    """Frames of the shortest path: one per label and a blank between equal neighbours."""
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


def collapse(path: Sequence[int]) -> list[int]:
    """Labels of a path: repeats merged, blanks dropped."""
    kept = [b for a, b in zip([BLANK, *path], path, strict=False) if a != b]
    return [int(label) for label in kept if label != BLANK]


def greedy_decode(
    logits: Float[Array, "batch frames labels"], frames: Int[Array, "batch"]
) -> list[list[int]]:
    """Labels of the most likely path of every utterance."""
    best = np.asarray(jnp.argmax(logits, axis=-1))
    return [
        collapse(path[:count].tolist())
        for path, count in zip(best, np.asarray(frames), strict=True)
    ]


def prefix_beam_decode(
    log_probabilities: Float[np.ndarray, "frames labels"],
    *,
    beam: int = 16,
    least: float = -math.inf,
) -> list[tuple[list[int], float]]:
    """The most likely label sequences, most likely first, each with ln of its probability.

    Sums over the paths of a prefix (Hannun et al., 2014, without a language model). Exact where
    `beam` is at least the number of possible prefixes.

    Args:
      log_probabilities: one utterance's, normalised over labels.
      beam: prefixes kept after every frame.
      least: labels below this log-probability do not extend a prefix in that frame.
    Raises:
      ValueError: beam below 1.
    """
    if beam < 1:
        raise ValueError(f"prefix_beam_decode: beam must be at least 1, got {beam}")
    # prefix -> ln p(paths that end in a blank), ln p(paths that end in the last label)
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for row in np.asarray(log_probabilities, np.float64):
        grown: dict[tuple[int, ...], list[float]] = collections.defaultdict(
            lambda: [-math.inf, -math.inf]
        )
        likely = [label for label in range(1, len(row)) if row[label] >= least]
        for prefix, (blank, last) in beams.items():
            total = np.logaddexp(blank, last)
            _add(grown[prefix], 0, total + row[BLANK])
            for label in likely:
                if prefix and label == prefix[-1]:  # a repeat merges, but for a blank between
                    _add(grown[prefix], 1, last + row[label])
                    _add(grown[(*prefix, label)], 1, blank + row[label])
                else:
                    _add(grown[(*prefix, label)], 1, total + row[label])
        possible = [item for item in grown.items() if max(item[1]) > -math.inf]
        ranked = sorted(possible, key=lambda item: -np.logaddexp(item[1][0], item[1][1]))[:beam]
        beams = {prefix: (blank, last) for prefix, (blank, last) in ranked}
    scored = [
        (list(prefix), float(np.logaddexp(ends[0], ends[1]))) for prefix, ends in beams.items()
    ]
    return sorted(scored, key=lambda item: -item[1])


def _add(ends: list[float], which: int, value: float) -> None:
    ends[which] = float(np.logaddexp(ends[which], value))
