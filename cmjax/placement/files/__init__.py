"""Recorded loads in, plans out, in every format that recorders and engines use."""

from cmjax.placement.files.formats import (
    ENGINES,
    PLAN_FORMATS,
    Engine,
    plan_text,
    read_plan,
    read_plans,
    routing_of,
    write_plan,
)
from cmjax.placement.files.readers import domains, read_family, read_loads, read_pairs, read_routes

__all__ = [
    "ENGINES",
    "PLAN_FORMATS",
    "Engine",
    "domains",
    "plan_text",
    "read_family",
    "read_loads",
    "read_pairs",
    "read_plan",
    "read_plans",
    "read_routes",
    "routing_of",
    "write_plan",
]
