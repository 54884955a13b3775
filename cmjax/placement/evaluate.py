"""How good a plan is: balance, priced time, and how far it is from what no plan can beat.

PAR (peak-to-average ratio) of a layer is max / mean of its tokens per rank; balancedness is its
inverse, mean / max.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cmjax.placement.greedy import replicate
from cmjax.placement.loads import Loads
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Plan, Problem, count_copies


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
    slots = plan.experts.shape[1]
    problem = Problem(loads, plan.ranks, slots - plan.expert_count, plan.nodes)
    return Evaluation(
        par=tokens.max(-1) / tokens.mean(-1),
        time_s=price_s(layer_time_s, tokens).sum(-1),
        lower_bound_s=lower_bound_time_s(problem, layer_time_s).sum(-1),
    )


def lower_bound_tokens(problem: Problem) -> Float[np.ndarray, "windows layers"]:
    """Tokens that the busiest rank gets at least, under any plan with an even split over copies.

    The mean over ranks, or the smallest largest load of a single copy that the slots allow if they
    served this window alone: some rank has to hold that copy.
    """
    counts = problem.loads.counts
    rows = counts.reshape(-1, problem.experts)
    copies = count_copies(replicate(rows, problem.slots), problem.experts)
    copy = (rows / copies).max(-1).reshape(counts.shape[:2])
    return np.maximum(counts.sum(-1) / problem.ranks, copy)


def lower_bound_time_s(
    problem: Problem, layer_time_s: LayerTime
) -> Float[np.ndarray, "windows layers"]:
    """Seconds that no plan can beat, by window and layer, for a symmetric convex `layer_time_s`.

    One rank gets `lower_bound_tokens`, the others share the rest evenly. Every plan's tokens
    majorise this vector, so any Schur-convex price (the slowest rank's, for one) is at least this.
    A price that tells ranks apart, as by their node, is not bounded by it.
    """
    counts = problem.loads.counts
    peak = lower_bound_tokens(problem)[..., None]
    others = problem.ranks - 1
    rest = (counts.sum(-1, keepdims=True) - peak) / max(others, 1)
    tokens = np.concatenate([peak, np.repeat(rest, others, axis=-1)], axis=-1)
    return price_s(layer_time_s, tokens)
