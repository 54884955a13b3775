"""How good a plan is: bounds, balance, priced time, comparison."""

from cmjax.placement.judging.align import align
from cmjax.placement.judging.bounds import (
    lower_bound_objective_s,
    lower_bound_time_s,
    lower_bound_tokens,
)
from cmjax.placement.judging.compare import BASELINES, Comparison, Judge, compare
from cmjax.placement.judging.multicast import Reach, expected_reach, group_ranks, reach
from cmjax.placement.judging.score import Score, evaluate, evaluate_by_depth
from cmjax.placement.judging.shrinkage import choose_shrink
from cmjax.placement.judging.step_noise import step_par
from cmjax.placement.judging.traffic import node_bytes

__all__ = [
    "BASELINES",
    "Comparison",
    "Judge",
    "Reach",
    "Score",
    "align",
    "choose_shrink",
    "compare",
    "evaluate",
    "evaluate_by_depth",
    "expected_reach",
    "group_ranks",
    "lower_bound_objective_s",
    "lower_bound_time_s",
    "lower_bound_tokens",
    "node_bytes",
    "reach",
    "step_par",
]
