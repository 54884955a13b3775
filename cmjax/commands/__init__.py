"""The subcommands of `cmjax`: each a dataclass whose fields are its options, and a `run`."""

from cmjax.commands.calibrate import Fit, Validate
from cmjax.commands.machines import Machines
from cmjax.commands.micro import Micro
from cmjax.commands.place import Place
from cmjax.commands.predict import Predict
from cmjax.commands.price import Price

__all__ = ["Fit", "Machines", "Micro", "Place", "Predict", "Price", "Validate"]
