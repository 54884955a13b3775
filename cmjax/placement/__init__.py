"""Where experts live: the problem, the gradient optimiser, its baselines and the bound."""

from cmjax.placement.contiguous import contiguous
from cmjax.placement.evaluate import Evaluation, evaluate, lower_bound_time_s, lower_bound_tokens
from cmjax.placement.example import example_loads
from cmjax.placement.formats import (
    PLAN_FORMATS,
    StoredPlan,
    plan_text,
    read_plan,
    read_plans,
    write_plan,
)
from cmjax.placement.gradient import GradientConfig, gradient
from cmjax.placement.greedy import greedy
from cmjax.placement.judge import align, judge
from cmjax.placement.loads import Loads
from cmjax.placement.migration import Move, match, moves, wire_s
from cmjax.placement.once_per_rank import once_per_rank
from cmjax.placement.place import METHODS, check_method, place, register_method
from cmjax.placement.pricing import LayerTime
from cmjax.placement.problem import Plan, Problem
from cmjax.placement.readers import domains, read_family, read_loads, read_pairs, read_routes
from cmjax.placement.rebalancer import MoveCost, Proposal, Rebalancer
from cmjax.placement.routes import Routes
from cmjax.placement.traffic import Reach, node_bytes, reach

__all__ = [
    "METHODS",
    "PLAN_FORMATS",
    "Evaluation",
    "GradientConfig",
    "LayerTime",
    "Loads",
    "Move",
    "MoveCost",
    "Plan",
    "Problem",
    "Proposal",
    "Reach",
    "Rebalancer",
    "Routes",
    "StoredPlan",
    "align",
    "check_method",
    "contiguous",
    "domains",
    "evaluate",
    "example_loads",
    "gradient",
    "greedy",
    "judge",
    "lower_bound_time_s",
    "lower_bound_tokens",
    "match",
    "moves",
    "node_bytes",
    "once_per_rank",
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
    "wire_s",
    "write_plan",
]
