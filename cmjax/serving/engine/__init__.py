"""The event loop: what is told to it (`EngineInputs`), what it says (`EngineOutputs`), and two
implementations that give the same bits: C++ (`cmjax.native`), and Python, which is its definition.
"""

from cmjax.serving.engine.inputs import (
    COLOCATED,
    DECODE,
    FIXED,
    PREFILL,
    CacheInputs,
    EngineInputs,
    Inputs,
    WorkerInputs,
)
from cmjax.serving.engine.outputs import GAUGES, EngineOutputs
from cmjax.serving.engine.run import engine_in_use, run

__all__ = [
    "COLOCATED",
    "DECODE",
    "FIXED",
    "GAUGES",
    "PREFILL",
    "CacheInputs",
    "EngineInputs",
    "EngineOutputs",
    "Inputs",
    "WorkerInputs",
    "engine_in_use",
    "run",
]
