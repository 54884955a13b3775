"""Plans as files: cmjax's own format, SGLang's, vLLM-Ascend's, and OmniPlacement's to read."""

from cmjax.placement.formats.plan_file import (
    PLAN_FORMATS,
    plan_text,
    read_plan,
    read_plans,
    write_plan,
)
from cmjax.placement.formats.stored import EMPTY, StoredPlan

__all__ = [
    "EMPTY",
    "PLAN_FORMATS",
    "StoredPlan",
    "plan_text",
    "read_plan",
    "read_plans",
    "write_plan",
]
