"""How long a program takes: engines, fabric, schedule; and the fit of their few constants."""

from cmjax.cost.price import price
from cmjax.cost.timeline import Event, Timeline

__all__ = ["Event", "Timeline", "price"]
