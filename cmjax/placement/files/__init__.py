"""Recorded loads in, plans out, in every format that recorders and engines use."""

from cmjax.placement.files.formats import PLAN_FORMATS, plan_text, read_plan, read_plans, write_plan
from cmjax.placement.files.readers import domains, read_family, read_loads, read_pairs, read_routes

__all__ = [
    "PLAN_FORMATS",
    "domains",
    "plan_text",
    "read_family",
    "read_loads",
    "read_pairs",
    "read_plan",
    "read_plans",
    "read_routes",
    "write_plan",
]
