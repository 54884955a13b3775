"""Where experts live: the problem, the search, the rules it is compared with, and the bounds."""

from cmjax.placement.bounds import (
    lower_bound_objective_s,
    lower_bound_time_s,
    lower_bound_tokens,
)
from cmjax.placement.budgets import choose_slots
from cmjax.placement.compare import BASELINES, Judged, compare, judge_plan
from cmjax.placement.contiguous import contiguous
from cmjax.placement.evaluate import Evaluation, evaluate
from cmjax.placement.example import example_family, example_loads
from cmjax.placement.greedy import greedy, greedy_global, greedy_hierarchical
from cmjax.placement.loads import Loads, read_loads
from cmjax.placement.multicast import Reach, group_ranks, reach
from cmjax.placement.one_spare import one_spare
from cmjax.placement.place import METHODS, check_method, place, register_method
from cmjax.placement.plan import Plan
from cmjax.placement.pricing import LayerTime
from cmjax.placement.problem import Problem
from cmjax.placement.repair import count_moves, repair
from cmjax.placement.risk import Risk
from cmjax.placement.search import SearchConfig, search
from cmjax.placement.shuffled import shuffled
from cmjax.placement.split import optimise_split
from cmjax.placement.step_noise import step_par

__all__ = [
    "BASELINES",
    "METHODS",
    "Evaluation",
    "Judged",
    "LayerTime",
    "Loads",
    "Plan",
    "Problem",
    "Reach",
    "Risk",
    "SearchConfig",
    "check_method",
    "choose_slots",
    "compare",
    "contiguous",
    "count_moves",
    "evaluate",
    "example_family",
    "example_loads",
    "greedy",
    "greedy_global",
    "greedy_hierarchical",
    "group_ranks",
    "judge_plan",
    "lower_bound_objective_s",
    "lower_bound_time_s",
    "lower_bound_tokens",
    "one_spare",
    "optimise_split",
    "place",
    "reach",
    "read_loads",
    "register_method",
    "repair",
    "search",
    "shuffled",
    "step_par",
]
