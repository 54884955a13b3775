"""How long a program takes: engines, fabric, schedule; and the fit of their few constants."""

from cmjax.cost.functions import Prepared, prepare, price_function
from cmjax.cost.price import SizesApart, price
from cmjax.cost.replay import Event
from cmjax.cost.timeline import LoopTime, Timeline

__all__ = [
    "Event",
    "LoopTime",
    "Prepared",
    "SizesApart",
    "Timeline",
    "prepare",
    "price",
    "price_function",
]
