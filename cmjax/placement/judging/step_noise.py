"""Balance of single steps: what a decode step waits for once the totals are balanced.

A step routes few tokens, so its counts scatter around the expected load. A step is drawn as a
multinomial sample of its assignments over the experts; copies share the tokens of their expert as
the plan says, to fractions of a token.
"""

import numpy as np
from jaxtyping import Float

from cmjax.placement.loads import Loads
from cmjax.placement.plan import Plan


def step_par(
    plan: Plan, loads: Loads, assignments: int, *, samples: int = 16, seed: int = 0
) -> Float[np.ndarray, "windows layers"]:
    """max / mean tokens per rank of a step, mean over sampled steps.

    Args:
      plan: the placement.
      loads: what the steps are drawn from, window by window.
      assignments: tokens of all ranks together times experts per token.
      samples: steps drawn.
      seed: of the draw.
    Raises: ValueError without assignments or samples.
    """
    if assignments < 1 or samples < 1:
        raise ValueError(
            f"step_par: assignments and samples must be at least 1, got {assignments} and {samples}"
        )
    rng = np.random.default_rng(seed)
    shares = loads.counts / loads.counts.sum(-1, keepdims=True)
    par = np.zeros(shares.shape[:2])
    for _ in range(samples):
        tokens = plan.tokens_per_rank(rng.multinomial(assignments, shares))
        par += tokens.max(-1) / (assignments / plan.alive.sum())
    return par / samples
