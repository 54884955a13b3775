"""What a placement is judged by: the priced time of one MoE layer.

The price is a callable `layer_time_s(tokens_per_rank)` that the caller passes in. It takes the
tokens on every rank, `[..., ranks]`, in the unit of the loads, and returns seconds, `[...]`. It
must be pure, traceable by JAX and non-decreasing in every rank's tokens; typically it is constants
plus an affine or piecewise affine function of the slowest rank.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

LayerTime = Callable[[Any], Any]


def price_s(
    layer_time_s: LayerTime, tokens: Float[np.ndarray, "*batch ranks"]
) -> Float[np.ndarray, "*batch"]:
    """Price tokens per rank in double precision, whatever the caller's default precision.

    Plans of equal quality differ in the sixth digit, which single precision cannot rank.

    Args:
      layer_time_s: the priced layer, see the module's docstring.
      tokens: tokens on each rank, in the unit `layer_time_s` expects.
    Returns: seconds, one per row of `tokens`, float64.
    Raises: ValueError if the callable does not reduce the last axis or returns no finite numbers.
    """
    with jax.enable_x64(True):
        seconds = np.asarray(layer_time_s(jnp.asarray(tokens, jnp.float64)), np.float64)
    if seconds.shape != tokens.shape[:-1]:
        raise ValueError(
            f"layer_time_s: expected a result of shape {tokens.shape[:-1]} for tokens of shape "
            f"{tokens.shape} (the last axis, ranks, reduced), got {seconds.shape}"
        )
    if not np.isfinite(seconds).all():
        raise ValueError("layer_time_s: expected finite seconds, got NaN or infinity")
    return seconds


def noted(seconds: float) -> str:
    """A time as the note of a `Progress`: seven digits, as good plans differ in the sixth."""
    return f"{seconds * 1e3:.7g} ms"
