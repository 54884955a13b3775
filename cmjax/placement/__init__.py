"""Where experts live: the problem, the gradient optimiser, its baselines and the bound."""

from cmjax.placement.contiguous import contiguous
from cmjax.placement.evaluate import Evaluation, evaluate, lower_bound_time_s, lower_bound_tokens
from cmjax.placement.example import example_loads
from cmjax.placement.gradient import GradientConfig, gradient
from cmjax.placement.greedy import greedy
from cmjax.placement.loads import Loads
from cmjax.placement.place import METHODS, check_method, place, register_method
from cmjax.placement.pricing import LayerTime
from cmjax.placement.problem import Plan, Problem
from cmjax.placement.readers import domains, read_family, read_loads, read_pairs, read_routes
from cmjax.placement.routes import Routes

__all__ = [
    "METHODS",
    "Evaluation",
    "GradientConfig",
    "LayerTime",
    "Loads",
    "Plan",
    "Problem",
    "Routes",
    "check_method",
    "contiguous",
    "domains",
    "evaluate",
    "example_loads",
    "gradient",
    "greedy",
    "lower_bound_time_s",
    "lower_bound_tokens",
    "place",
    "read_family",
    "read_loads",
    "read_pairs",
    "read_routes",
    "register_method",
]
