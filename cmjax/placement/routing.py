"""Which copy of an expert its tokens go to: the rule of the engine that serves the plan.

Every source rank sends equally many tokens of an expert. An expert with c copies on R ranks, at
most one on each, then has on rank r the share

    even          1 / c: tokens are dealt over the copies (by position in the batch, or at random)
    nearest-copy  (served[r] + others / c) / R: a source uses the copy on its own rank, else the
                  first one on its own node; the `others`, ranks of nodes without a copy, are
                  spread over all copies. SGLang's static dispatch, the one it takes with a file
                  (`compute_logical_to_rank_dispatch_physical_map`, read in SGLang 0.5.6; it deals
                  what is left over at random, which is even in expectation)
    rank-modulo   |{s < R : s mod c = k}| / R for the k-th copy in the order of ranks: source s uses
                  copy s mod c (`generate_log2phy_map` of vLLM-Ascend)

vLLM and TensorRT-LLM choose by position in the batch, which is even.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

RoutingName = Literal["even", "nearest-copy", "rank-modulo"]
ROUTINGS: tuple[str, ...] = get_args(RoutingName)
"""Rules that are known."""


@dataclass(frozen=True)
class Routing:
    """A rule on so many nodes; `routing(held)` gives the share of each rank.

    Attributes:
      name: one of `ROUTINGS`.
      nodes: nodes the ranks are spread over, in order and evenly.
    Raises: ValueError for another name.

    >>> on_four = np.array([True, True, False, True])
    >>> [Routing(name, nodes=2)(on_four).tolist() for name in ROUTINGS[1:]]
    [[0.25, 0.25, 0.0, 0.5], [0.5, 0.25, 0.0, 0.25]]
    """

    name: str = "even"
    nodes: int = 1

    def __post_init__(self):
        if self.name not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {self.name!r}")

    def __call__(
        self,
        held: Bool[Array | np.ndarray, "*batch ranks"],
        sources: Bool[np.ndarray, "ranks"] | None = None,
    ) -> Float[Array | np.ndarray, "*batch ranks"]:
        """The share of an expert's tokens that each rank serves; 0 throughout where none holds it.

        Args:
          held: whether a rank holds a copy; NumPy or JAX.
          sources: ranks that send tokens (default: all).
        """
        xp = np if isinstance(held, np.ndarray) else jnp
        held = xp.asarray(held, bool)
        one = held * (1.0 if xp is np else jnp.float32(1))
        copies = xp.maximum(one.sum(-1, keepdims=True), 1)
        if self.name == "even":
            return one / copies
        sending = xp.ones(held.shape[-1]) if sources is None else xp.asarray(sources * 1.0)
        total = sending.sum()
        if self.name == "rank-modulo":
            place = xp.cumsum(one, -1) - 1
            rest = total - copies * (total // copies)
            return one * (total // copies + (place < rest)) / total
        by_node = one.reshape(*one.shape[:-1], self.nodes, -1)
        sending = sending.reshape(self.nodes, -1)
        first = by_node * (xp.cumsum(by_node, -1) == 1)
        own = by_node * sending
        near = first * (sending.sum(-1) - own.sum(-1))[..., None]
        bare = (by_node.sum(-1) == 0) * sending.sum(-1)
        left = bare.sum(-1, keepdims=True) / copies
        return ((own + near).reshape(one.shape) + one * left) / total

    def least_top_share(self, ranks: int) -> Float[np.ndarray, "ranks"]:
        """The least that the busiest of up to c copies can serve, for c = 1 to `ranks`.

        No way to place c copies, or fewer, gives all of them less. It is 1 / c if split evenly; a
        rule may leave it the same for several c.
        """
        copies = np.arange(1, ranks + 1)
        if self.name == "rank-modulo":
            share = -(-ranks // copies) / ranks
        elif self.name == "nearest-copy":
            size = ranks // self.nodes
            with_copy = np.arange(1, self.nodes + 1)[:, None]  # nodes that hold one
            # The first copy of the fullest-equipped node serves the node's ranks without one.
            near = np.maximum(size - copies // with_copy + 1, 1)
            left = (self.nodes - with_copy) * size / copies
            possible = (with_copy <= copies) & (-(-copies // with_copy) <= size)
            share = np.where(possible, near + left, np.inf).min(0) / ranks
            share = np.maximum(share, 1 / copies)
        else:
            share = 1 / copies
        return np.minimum.accumulate(share)


EVEN = Routing()
