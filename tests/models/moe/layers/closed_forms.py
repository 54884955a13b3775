"""What the attention layers share, in float64 NumPy."""

import numpy as np


def rms_norm(x, gain, eps):
    """Of the last axis."""
    return gain * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def turned(x, positions, theta, interleave):
    """Rotary pairs as complex numbers: `(x_a + i x_b) exp(i p theta^(-2j/d))`.

    `x [..., tokens, (heads,) d]`; `positions [tokens]`, broadcast over heads. The product of a
    query and a key is the real part of one times the other's conjugate.
    """
    dim = x.shape[-1]
    first, second = (
        (x[..., 0::2], x[..., 1::2]) if interleave else (x[..., : dim // 2], x[..., dim // 2 :])
    )
    angle = positions[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    if x.ndim == 4:
        angle = angle[:, None]
    return (first + 1j * second) * np.exp(1j * angle)


def softmax(scores, visible):
    """Over the last axis, of what is visible."""
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def causal(tokens, window=None):
    """`[query, key]`: keys up to the query's own, the newest `window` of them."""
    behind = np.arange(tokens)[:, None] - np.arange(tokens)
    return (behind >= 0) & (behind < (window or tokens))
