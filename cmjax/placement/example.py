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
