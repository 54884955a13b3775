"""What the attention layers share, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


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


def randomized(module):
    """`module` with every parameter random, gains and biases too."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(1 + 0.3 * rng.normal(size=x.shape) if x.ndim == 1 else x, x.dtype),
        nnx.to_pure_dict(nnx.state(module)),
    )
    nnx.update(module, nnx.State(params))
    return module


def inputs(sequences, tokens, hidden):
    """Normal float32 numbers, `[sequences, tokens, hidden]`."""
    shape = (sequences, tokens, hidden)
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def linear(x, part):
    """A linear layer of a parameter dictionary."""
    return x @ part["weight"] + part.get("bias", 0.0)
