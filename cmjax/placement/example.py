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
    phase: float = 0.28,
    drift: float = 0.16,
    seed: int = 0,
) -> Loads:
    """Synthetic counts of several workloads of one model, one window each.

    In every layer the expert of popularity rank r has a share ~ (r + 2)**-exponent. Workloads shift
    it by log-normal noise: of scale `phase` for every other workload together (prefill and decode),
    and of `2 · drift · (w / (workloads - 1))**6` for workload w alone, so that most are alike and
    some are not.

    The defaults are those at which greedy replicate-and-pack does as it is reported to do on 12
    recorded workloads of DeepSeek-R1, whose counts are not public. Busiest rank over the mean, in
    the mean and the worst workload, here and there: 288 slots on 32 ranks 1.16 / 1.28 and 1.16 /
    1.30, 288 on 72 1.29 / 1.53 and 1.27 / 1.55, 320 on 64 1.25 / 1.45 and 1.24 / 1.46, 320 on 160
    1.46 / 1.84 and 1.44 / 1.94; 1.35 / 1.36 and 1.34 / 1.37 planned on the largest load of any
    workload. The hottest expert of a workload gets 6.6 to 7.4 times the mean (recorded: 5.6 to
    8.1), of a layer up to 15.2 (13.7).
    """
    rng = np.random.default_rng(seed)
    shares = (np.arange(experts) + 2.0) ** -exponent
    base = np.stack([rng.permutation(shares) for _ in range(layers)])
    phases = rng.normal(size=(2, layers, experts))[np.arange(workloads) % 2]
    own = rng.normal(size=(workloads, layers, experts))
    scale = 2 * drift * (np.arange(workloads) / max(workloads - 1, 1)) ** 6
    popular = base * np.exp(phase * phases + scale[:, None, None] * own)
    return Loads(np.round(1e7 * popular / popular.sum(-1, keepdims=True)) + 1, "example family")
