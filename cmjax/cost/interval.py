"""How sure a priced number is: the delta method through the elasticities of the price.

    sd(log y)^2 = g^T C g,       g_i = d log y / d log theta_i,       interval = y exp(+- 1.645 sd)

C is the covariance of the logarithms of the machine's constants (`cmjax.hardware.uncertainty`):
Laplace's for fitted ones, a spread by source for the others. The model's own error is in it too,
as the spread of `machine.factors`: time over the model's, by kind of operation.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from cmjax.hardware import Uncertainty

Z90 = 1.6448536
"""Standard deviations that hold 90 % of a normal variable, on either side."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """90 % of what a number may be.

    Fields:
      low, high: its ends. spread: standard deviation of its logarithm.
      shares: of its variance, by constant; those of fitted ones that share a covariance add up to
        theirs together. Largest first. elasticity: of the number, by constant, as it was given.
    """

    low: float
    high: float
    spread: float
    shares: dict[str, float]
    elasticity: Float[np.ndarray, "keys"]


def interval(value: float, elasticity: Float[np.ndarray, "keys"], known: Uncertainty) -> Interval:
    """The interval of a positive number.

    Args:
      value: the number. elasticity: percent that it changes per percent of each of `known.keys`.

    >>> known = Uncertainty(("chip.hbm_bytes_per_s",), np.array([[0.01]]))
    >>> found = interval(50.0, np.array([-0.5]), known)
    >>> round(found.low, 2), round(found.high, 2)
    (46.05, 54.29)
    """
    each = elasticity * (known.covariance @ elasticity)
    variance = float(np.sum(each))
    spread = float(np.sqrt(max(variance, 0.0)))
    shares = {k: float(e) / variance for k, e in zip(known.keys, each, strict=True) if variance}
    ordered = dict(sorted(shares.items(), key=lambda entry: -entry[1]))
    factor = float(np.exp(Z90 * spread))
    return Interval(value / factor, value * factor, spread, ordered, elasticity)
