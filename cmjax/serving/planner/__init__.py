"""How many instances of which kind: a fluid model proposes by gradient, the simulator confirms."""

from cmjax.serving.planner.capacity import CapacityPlan, plan
from cmjax.serving.planner.fluid import Demand, Fluid, Limits, propose
from cmjax.serving.planner.judge import Judged, judge

__all__ = ["CapacityPlan", "Demand", "Fluid", "Judged", "Limits", "judge", "plan", "propose"]
