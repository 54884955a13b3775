"""How requests flow: a trace replayed through prefill, decode and cache pools.

    trace -> router -> prefill instances -> RDMA -> decode instances
                        |      ^
                        v      |
                       context cache

The event loop is in `engine`; what is told to it comes from a `Trace` (`traces`), a `Service`
(instances and rules) and `StepTimes` (priced by `cmjax.deploy`, or measured).
"""

from cmjax.serving.assemble import Replay
from cmjax.serving.calibrate import calibrate, measured_engine, read_measured
from cmjax.serving.result import ServingResult
from cmjax.serving.serve import best_latencies, serve, simulate
from cmjax.serving.service import (
    ColocatedPool,
    ContextCache,
    DecodePool,
    Loss,
    Pool,
    PrefillPool,
    Service,
    paper_service,
)
from cmjax.serving.service_file import read_service
from cmjax.serving.step_times import StepTimes, price_service, read_profile
from cmjax.serving.traces import Trace, generate, read_trace

__all__ = [
    "ColocatedPool",
    "ContextCache",
    "DecodePool",
    "Loss",
    "Pool",
    "PrefillPool",
    "Replay",
    "Service",
    "ServingResult",
    "StepTimes",
    "Trace",
    "best_latencies",
    "calibrate",
    "generate",
    "measured_engine",
    "paper_service",
    "price_service",
    "read_measured",
    "read_profile",
    "read_service",
    "read_trace",
    "serve",
    "simulate",
]
