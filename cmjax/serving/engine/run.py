"""Run the event loop: in C++ where it was built, else in Python, which says that it is slow."""

import warnings
from collections.abc import Callable

import numpy as np

from cmjax import native as kernels
from cmjax.serving.engine import native
from cmjax.serving.engine.cache import Cache
from cmjax.serving.engine.inputs import EngineInputs
from cmjax.serving.engine.outputs import EngineOutputs
from cmjax.serving.engine.simulation import Simulation

_QUICK = 2_000
"""Requests that the Python loop takes without a word."""


def engine_in_use() -> str:
    """`native` or `python`; both give the same bits."""
    return "native" if native.available() else "python"


def run(given: EngineInputs, progress: Callable[[int], bool] | None = None) -> EngineOutputs:
    """Replay the requests.

    Args:
      given: what there is. progress: called now and then with how many requests have ended; the run
        stops with KeyboardInterrupt where it returns True.
    """
    if native.available():
        return native.simulate(given, progress)
    if len(given.requests.arrival_s) > _QUICK:
        warnings.warn(
            "serving runs in Python, which gives the same result about 50 times as slowly: "
            f"{kernels.status().reason}",
            stacklevel=2,
        )
    return Simulation(given).run(progress)


def hits(given: EngineInputs) -> np.ndarray:
    """Blocks that each request finds in a cache, where they come one after another and are held at
    once: what a cache of that size can give, whatever the timing."""
    if native.available():
        return native.hits(given)
    cache, requests = Cache(given.cache), given.requests
    found = np.empty(len(requests.arrival_s), np.int64)
    starts = requests.block_start.tolist()
    for i in range(len(found)):
        blocks = requests.block[starts[i] : starts[i + 1]].tolist()
        found[i] = cache.fetch(0, blocks)[0]
        for block in blocks:
            cache.insert(0, block)
    return found
