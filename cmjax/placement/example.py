"""A built-in expert load for machines without recorded ones."""

import numpy as np

from cmjax.placement.loads import Loads


def example_loads(
    *,
    windows: int = 4,
    layers: int = 58,
    experts: int = 256,
    exponent: float = 0.5,
    drift: float = 0.3,
    seed: int = 0,
) -> Loads:
    """Synthetic counts with the skew that recorded DeepSeek-R1 loads have.

    In every layer the expert of popularity rank r gets a share ~ r**-exponent, in an order drawn
    per layer; each window multiplies the shares by log-normal noise of scale `drift`.
    Recorded loads follow exponents of 0.42 to 0.58 over the busier half of the experts, so 0.5 is
    the default.
    """
    rng = np.random.default_rng(seed)
    shares = np.arange(1, experts + 1) ** -exponent
    shares = np.stack([rng.permutation(shares) for _ in range(layers)])
    noise = np.exp(drift * rng.normal(size=(windows, layers, experts)))
    return Loads(np.round(1e6 * shares / shares.sum(-1, keepdims=True) * noise) + 1, "example")


def example_family(
    *,
    workloads: int = 12,
    layers: int = 58,
    experts: int = 256,
    exponent: float = 0.5,
    phase: float = 0.2,
    drift: float = 0.2,
    seed: int = 0,
) -> Loads:
    """Synthetic counts of several workloads of one model, one window each.

    In every layer every workload has shares ~ (r + 1/2)**-exponent of its own popularity rank r, so
    the hottest expert gets 7 times the mean of 256. Which experts are popular is shared by all,
    shifted by log-normal noise: `phase` for every other workload together (prefill and decode), and
    `2 · drift · (w / (workloads - 1))²` for workload w alone, so that some are like most and
    some are not. Recorded families of DeepSeek-R1 workloads are alike in these respects: exponents
    of 0.42 to 0.58, hottest experts of 5.6 to 8.1 times the mean, greedy planned on the mean load
    1.16 / 1.30 (mean / worst workload) on 32 ranks with 32 spare slots, where this one has
    1.15 / 1.26.
    """
    rng = np.random.default_rng(seed)
    shares = (np.arange(experts) + 1.5) ** -exponent
    base = np.stack([rng.permutation(shares) for _ in range(layers)])
    phases = rng.normal(size=(2, layers, experts))[np.arange(workloads) % 2]
    own = rng.normal(size=(workloads, layers, experts))
    scale = 2 * drift * (np.arange(workloads) / max(workloads - 1, 1)) ** 2
    popular = base * np.exp(phase * phases + scale[:, None, None] * own)
    counts = np.empty_like(popular)
    order = np.argsort(-popular, axis=-1)
    np.put_along_axis(counts, order, np.broadcast_to(shares, counts.shape), axis=-1)
    return Loads(np.round(1e7 * counts / shares.sum()), "example family")
