"""How much is tried: a few examples of each in the suite, many by `make fuzz`."""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("CMJAX_FUZZ", "60"))
settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES,
    deadline=2000,  # ms: nothing that is refused takes longer
    derandomize="CMJAX_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
