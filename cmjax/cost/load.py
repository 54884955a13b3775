"""How much more the slowest rank has to do than the mean, in a mixture-of-experts layer."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def imbalance(tokens_per_rank: Float[ArrayLike, "*layers ranks"]) -> Float[Array, "*layers"]:
    """Rows on the slowest rank over the mean: max_r x_r / mean_r x_r, per layer."""
    tokens_per_rank = jnp.asarray(tokens_per_rank, float)
    return jnp.max(tokens_per_rank, -1) / jnp.mean(tokens_per_rank, -1)


def sampling_imbalance(rows_per_rank, ranks: int):
    """Imbalance that remains when the *expected* load of all ranks is equal.

    A step routes a finite number of rows, so a rank's count scatters around its mean m like a
    Poisson variable; the largest of R of them is about m + sqrt(2 m ln R) (extreme value theory,
    leading order). Returns 1 + sqrt(2 ln R / m).
    """
    if ranks == 1:
        return jnp.ones_like(jnp.asarray(rows_per_rank, float))
    return 1.0 + jnp.sqrt(2.0 * jnp.log(float(ranks)) / jnp.asarray(rows_per_rank, float))
