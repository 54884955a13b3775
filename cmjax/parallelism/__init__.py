"""How training is split over a machine: PanGu-alpha's five dimensions, on the same cost model."""

from cmjax.parallelism.measured import Comparison, MeasuredRow, compare
from cmjax.parallelism.memory import Memory, memory_of
from cmjax.parallelism.parallel import parallel
from cmjax.parallelism.plan import Plan, parse_plan
from cmjax.parallelism.pricing import Prices, StepTime
from cmjax.parallelism.result import ParallelPlans, PricedPlan
from cmjax.parallelism.schedules import bubble, in_flight, pipeline_s, replay
from cmjax.parallelism.search import price_plan, search

__all__ = [
    "Comparison",
    "MeasuredRow",
    "Memory",
    "ParallelPlans",
    "Plan",
    "PricedPlan",
    "Prices",
    "StepTime",
    "bubble",
    "compare",
    "in_flight",
    "memory_of",
    "parallel",
    "parse_plan",
    "pipeline_s",
    "price_plan",
    "replay",
    "search",
]
