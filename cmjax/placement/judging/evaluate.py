"""How good a plan is: balance, priced time, and how far it is from what no plan can beat.

PAR (peak-to-average ratio) of a layer is max / mean of its tokens per rank; balancedness is its
inverse, mean / max.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cmjax.placement.judging.bounds import lower_bound_time_s
from cmjax.placement.loads import Loads
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Plan, Problem


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A plan under loads; all arrays are float64 and keep the windows apart.

    Attributes:
      par: max / mean tokens per rank, by window and layer.
      time_s: priced time of all layers together, by window.
      lower_bound_s: what no plan with as many slots can beat, by window.
    """

    par: Float[np.ndarray, "windows layers"]
    time_s: Float[np.ndarray, "windows"]
    lower_bound_s: Float[np.ndarray, "windows"]

    @property
    def mean_par(self) -> float:
        """PAR averaged over windows and layers."""
        return float(self.par.mean())

    @property
    def worst_par(self) -> float:
        """PAR of the worst layer, averaged over windows."""
        return float(self.par.mean(0).max())

    @property
    def balancedness(self) -> float:
        """mean / max tokens per rank, averaged over windows and layers."""
        return float((1 / self.par).mean())

    @property
    def mean_time_s(self) -> float:
        """Priced time of all layers, averaged over windows."""
        return float(self.time_s.mean())

    @property
    def gap(self) -> float:
        """Mean time over the mean lower bound, minus one; 0 is optimal."""
        return float(self.time_s.mean() / self.lower_bound_s.mean() - 1)


def evaluate(plan: Plan, loads: Loads, layer_time_s: LayerTime) -> Evaluation:
    """Judge `plan` under `loads`, which need not be the loads it was made for.

    Raises: ValueError if the loads' layers and experts are not the plan's.
    """
    tokens = plan.tokens_per_rank(loads.counts)
    alive = tokens[..., plan.alive]
    dead = tuple(np.flatnonzero(~plan.alive).tolist())
    redundant = plan.slots - plan.expert_count
    problem = Problem(loads, plan.ranks, redundant, plan.nodes, without_ranks=dead)
    return Evaluation(
        par=alive.max(-1) / alive.mean(-1),
        time_s=price_s(layer_time_s, tokens).sum(-1),
        lower_bound_s=lower_bound_time_s(problem, layer_time_s).sum(-1),
    )
