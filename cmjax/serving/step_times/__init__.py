"""How long steps take: priced by `cmjax.deploy` on a grid, or from a profile that was measured."""

from cmjax.serving.step_times.priced import price_service
from cmjax.serving.step_times.profile import read_profile
from cmjax.serving.step_times.spread import step_spread
from cmjax.serving.step_times.step_times import StepTimes

__all__ = ["StepTimes", "price_service", "read_profile", "step_spread"]
