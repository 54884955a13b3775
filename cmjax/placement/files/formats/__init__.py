"""Plans as files: cmjax's own format, those of engines, and OmniPlacement's to read."""

from cmjax.placement.files.formats.engines import ENGINES, Engine, routing_of
from cmjax.placement.files.formats.plan_file import (
    PLAN_FORMATS,
    plan_text,
    read_plan,
    read_plans,
    write_plan,
)

__all__ = [
    "ENGINES",
    "PLAN_FORMATS",
    "Engine",
    "plan_text",
    "read_plan",
    "read_plans",
    "routing_of",
    "write_plan",
]
