"""Plans as files: cmjax's own format, SGLang's, vLLM-Ascend's, and OmniPlacement's to read."""

from cmjax.placement.files.formats.plan_file import (
    PLAN_FORMATS,
    plan_text,
    read_plan,
    read_plans,
    write_plan,
)

__all__ = [
    "PLAN_FORMATS",
    "plan_text",
    "read_plan",
    "read_plans",
    "write_plan",
]
