"""Whether a service keeps up with what is offered.

*overloaded*: the wait grows for as long as requests arrive, or more than a hundredth are refused or
never served: the numbers then depend on where the trace ends. *backlogged*: queues form that take
ten times as long as a prefill alone, for a tenth of the requests, and are worked off. *stable*:
neither. (A queue M/M/1 is backlogged from a load of about 0.75.) A prefill among others is no
measure: the longer the queue, the fuller its batches.
"""

from typing import Literal

import numpy as np

from cmjax.serving.metrics import Latencies

Verdict = Literal["stable", "backlogged", "overloaded"]
_GROWS = 0.03  # seconds of wait per second of arrivals: served is less than 97 % of what is offered
_REFUSED = 0.01
_LONG = 10  # times a prefill


def verdict(
    arrival_s: np.ndarray, prefill_s: float, found: Latencies, *, closed: bool = False
) -> Verdict:
    """Judge a run by the waits of its requests.

    Args:
      arrival_s: when requests arrived. prefill_s: what the prefill of a typical one takes alone.
      found: what they got. closed: arrivals wait for answers, so that no queue can grow.
    """
    if (~found.completed).mean() > _REFUSED:
        return "overloaded"
    wait, at = found.wait[found.completed], arrival_s[found.completed]
    if not closed and len(wait) >= 20 and at[-1] > at[0]:
        late = wait[len(wait) * 4 // 5 :]
        if _slope(at, wait) > _GROWS and late.mean() > _LONG * prefill_s:
            return "overloaded"
    return "backlogged" if np.percentile(wait, 90) > _LONG * prefill_s else "stable"


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the line of least squares."""
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())
