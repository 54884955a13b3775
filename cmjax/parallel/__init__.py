"""How training is split over a machine: PanGu-alpha's five dimensions, on the same cost model."""

from cmjax.parallel.measured import Comparison, MeasuredRow, compare
from cmjax.parallel.memory import Memory, memory_of
from cmjax.parallel.parallel import parallel
from cmjax.parallel.plan import Plan, parse_plan
from cmjax.parallel.pricing import Prices, StepTime
from cmjax.parallel.result import ParallelPlans, PricedPlan
from cmjax.parallel.schedules import bubble, in_flight, pipeline_s, replay
from cmjax.parallel.search import price_plan, search

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
