"""Load balancing without an auxiliary loss (DeepSeek-V3 report, section 2.1.2).

    b_e <- b_e - rate sign(load_e - mean load)

The router defines the derivative by its bias `b` to be the load, rows per expert
(`cmjax.models.moe.layers.router`). It is no gradient: it is neither averaged nor clipped.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_load(path: tuple) -> bool:
    """Whether a leaf of parameters or gradients is a balancing bias, or its load."""
    return [getattr(entry, "key", None) for entry in path[-2:]] == ["router", "bias"]


def balanced(optimizer: optax.GradientTransformation, rate: float) -> optax.GradientTransformation:
    """`optimizer` for all but the balancing biases, which take steps of one size.

    >>> import jax.numpy as jnp
    >>> transform = balanced(optax.sgd(0.1), rate=0.001)
    >>> params = {"router": {"bias": jnp.zeros(2), "weight": jnp.ones(2)}}
    >>> found = {"router": {"bias": jnp.array([3.0, 1.0]), "weight": jnp.ones(2)}}
    >>> updates, _ = transform.update(found, transform.init(params), params)
    >>> updates["router"]["bias"].tolist()  # float32
    [-0.0010000000474974513, 0.0010000000474974513]
    """

    def steps(load, params):
        del params
        return jax.tree.map(
            lambda x: -rate * jnp.sign(x - jnp.mean(x, axis=-1, keepdims=True)), load
        )

    def labels(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "balance" if is_load(path) else "descend", tree
        )

    return optax.partition({"descend": optimizer, "balance": optax.stateless(steps)}, labels)
