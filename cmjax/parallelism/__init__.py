"""How training is split over a machine: PanGu-alpha's five dimensions, on the same cost model."""

from cmjax.parallelism.executed import StepResult, TrainState
from cmjax.parallelism.expert_pieces import MoETraining
from cmjax.parallelism.expert_step import ExpertStep, expert_step
from cmjax.parallelism.experts import expert_traffic
from cmjax.parallelism.measured import Comparison, MeasuredRow, compare
from cmjax.parallelism.memory import Memory, memory_of
from cmjax.parallelism.parallel import named, parallel
from cmjax.parallelism.plan import Plan, parse_plan
from cmjax.parallelism.pricing import Prices, StepTime, elasticities
from cmjax.parallelism.result import ParallelPlans, PricedPlan
from cmjax.parallelism.schedules import bubble, in_flight, pipeline_s, replay
from cmjax.parallelism.search import price_plan, search
from cmjax.parallelism.timetable import Timetable, timetable
from cmjax.parallelism.traffic import PlanTraffic, plan_traffic
from cmjax.parallelism.train_step import TrainStep, train_step

__all__ = [
    "Comparison",
    "ExpertStep",
    "MeasuredRow",
    "Memory",
    "MoETraining",
    "ParallelPlans",
    "Plan",
    "PlanTraffic",
    "PricedPlan",
    "Prices",
    "StepResult",
    "StepTime",
    "Timetable",
    "TrainState",
    "TrainStep",
    "bubble",
    "compare",
    "elasticities",
    "expert_step",
    "expert_traffic",
    "in_flight",
    "memory_of",
    "named",
    "parallel",
    "parse_plan",
    "pipeline_s",
    "plan_traffic",
    "price_plan",
    "replay",
    "search",
    "timetable",
    "train_step",
]
