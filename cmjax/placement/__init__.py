"""Where experts live: the problem, the search, the rules it is compared with, and the bounds."""

from cmjax.placement.example import example_family, example_loads
from cmjax.placement.files.formats import PLAN_FORMATS, plan_text, read_plan, read_plans, write_plan
from cmjax.placement.files.readers import domains, read_family, read_loads, read_pairs, read_routes
from cmjax.placement.judging.bounds import (
    lower_bound_objective_s,
    lower_bound_time_s,
    lower_bound_tokens,
)
from cmjax.placement.judging.compare import BASELINES, Judged, compare, judge_plan
from cmjax.placement.judging.evaluate import Evaluation, evaluate
from cmjax.placement.judging.judge import align, judge
from cmjax.placement.judging.multicast import Reach, expected_reach, group_ranks, reach
from cmjax.placement.judging.shrinkage import choose_shrink
from cmjax.placement.judging.step_noise import step_par
from cmjax.placement.judging.traffic import node_bytes
from cmjax.placement.loads import Loads
from cmjax.placement.methods.budgets import choose_slots
from cmjax.placement.methods.contiguous import contiguous
from cmjax.placement.methods.gradient import GradientConfig, gradient, relax_and_round
from cmjax.placement.methods.greedy import greedy, greedy_global, greedy_hierarchical
from cmjax.placement.methods.once_per_rank import once_per_rank
from cmjax.placement.methods.one_spare import one_spare
from cmjax.placement.methods.place import METHODS, check_method, place, register_method
from cmjax.placement.methods.search import SearchConfig, search
from cmjax.placement.methods.shuffled import shuffled
from cmjax.placement.methods.split import optimise_split
from cmjax.placement.online.migration import Move, match, moves, wire_s
from cmjax.placement.online.rebalancer import MoveCost, Proposal, Rebalancer
from cmjax.placement.online.repair import count_moves, repair
from cmjax.placement.plan import Plan
from cmjax.placement.pricing import LayerTime
from cmjax.placement.problem import Problem
from cmjax.placement.risk import Risk
from cmjax.placement.routes import Routes
from cmjax.placement.shared import with_shared

__all__ = [
    "BASELINES",
    "METHODS",
    "PLAN_FORMATS",
    "Evaluation",
    "GradientConfig",
    "Judged",
    "LayerTime",
    "Loads",
    "Move",
    "MoveCost",
    "Plan",
    "Problem",
    "Proposal",
    "Reach",
    "Rebalancer",
    "Risk",
    "Routes",
    "SearchConfig",
    "align",
    "check_method",
    "choose_shrink",
    "choose_slots",
    "compare",
    "contiguous",
    "count_moves",
    "domains",
    "evaluate",
    "example_family",
    "example_loads",
    "expected_reach",
    "gradient",
    "greedy",
    "greedy_global",
    "greedy_hierarchical",
    "group_ranks",
    "judge",
    "judge_plan",
    "lower_bound_objective_s",
    "lower_bound_time_s",
    "lower_bound_tokens",
    "match",
    "moves",
    "node_bytes",
    "once_per_rank",
    "one_spare",
    "optimise_split",
    "place",
    "plan_text",
    "reach",
    "read_family",
    "read_loads",
    "read_pairs",
    "read_plan",
    "read_plans",
    "read_routes",
    "register_method",
    "relax_and_round",
    "repair",
    "search",
    "shuffled",
    "step_par",
    "wire_s",
    "with_shared",
    "write_plan",
]
