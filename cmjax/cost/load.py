"""How much more the slowest rank has to do than the mean, in a mixture-of-experts layer."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Num


def imbalance(tokens_per_rank: Num[ArrayLike, "*layers ranks"]) -> Float[Array, "*layers"]:
    """Rows on the slowest rank over the mean: max_r x_r / mean_r x_r, per layer."""
    tokens_per_rank = jnp.asarray(tokens_per_rank, float)
    return jnp.max(tokens_per_rank, -1) / jnp.mean(tokens_per_rank, -1)


def sampling_imbalance(rows_per_rank, ranks: int):
    """Imbalance that remains when the *expected* load of all ranks is equal.

    A step routes a finite number of rows, so a rank's count scatters around its mean m like a
    Poisson variable. The largest of R normal variables is on average

        z = a - (ln ln R + ln 4 pi) / (2 a) + gamma / a,        a = sqrt(2 ln R)

    standard deviations above the mean (extreme value theory, second order; gamma is Euler's
    constant), and the skew of a Poisson count adds (z^2 - 1) / 6 to the count (Cornish and Fisher).
    Returns: 1 + z / sqrt(m) + (z^2 - 1) / (6 m), at least 1.
    """
    mean = jnp.asarray(rows_per_rank, float)
    if ranks == 1:
        return jnp.ones_like(mean)
    a = math.sqrt(2.0 * math.log(ranks))
    z = a - (math.log(math.log(ranks)) + math.log(4 * math.pi)) / (2 * a) + np.euler_gamma / a
    return jnp.maximum(1.0 + z / jnp.sqrt(mean) + (z**2 - 1) / (6 * mean), 1.0)
