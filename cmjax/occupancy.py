"""How many places a token reaches whose experts are drawn independently: the occupancy problem.

Of k draws, each falling on a place with probability p, at least one falls there with probability

    P = 1 - (1 - p)**k,

so over all places a token reaches the sum of P, at most k of them.
"""

from typing import Any


def reach_probability(share: Any, draws: Any) -> Any:
    """P that at least one of `draws` independent draws falls on a place with this share of them.

    Args:
      share: p, the place's share of the draws, 0 to 1; a number or an array of NumPy or JAX.
      draws: k, experts per token; broadcasts to `share`.

    >>> reach_probability(1 / 8, 8) * 8  # eight draws reach 5.25 of eight even places
    5.25...
    """
    return 1 - (1 - share) ** draws
