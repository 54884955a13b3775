"""What the event loop says: when each request got what, and what the workers did meanwhile."""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int32, Int64

GAUGES = (
    "prefill_queue",
    "prefill_busy",
    "decode_queue",
    "decode_running",
    "decode_busy",
    "kv_tokens",
)
"""What is recorded over time, as means over bins."""
MOST_BINS = 4096
"""Of a run, however long it takes."""
COMPLETED, REJECTED, REJECTED_LATE = 1, 2, 3
"""How a request ended; 0 is a request that was never served, because no worker came back for it."""
GAP_LOW, GAP_BINS, GAP_PER_OCTAVE = -20, 32 * 128, 128
"""Gaps between tokens are counted in bins of 1/128 of an octave, from 2^-20 s."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EngineOutputs:
    """Per request, in the order of arrival; times in s on the trace's clock, -1 where it never
    came.

    Fields:
      ended: `COMPLETED`, `REJECTED` (at arrival), `REJECTED_LATE` (after its prefill) or 0.
      arrival_s: as replayed (a closed loop decides it). scheduled_s: its prefill started;
        first_s, last_s: tokens; decode_s: its first decode step started.
      hit_blocks, hit_tokens: found in the cache when it was first scheduled.
      retries: after the loss of a worker or a preemption.
      prefill_worker, decode_worker: that served it last.
      gaps: number of gaps between tokens by length.
      gauges: `[bins, len(GAUGES)]`, integrals over a bin [x s]. bin_s: its width.
      peak_kv: the most tokens that each worker held, fixed point. busy_s: of each worker.
      spans: busy intervals `[spans, (worker, start_s, end_s, prompt tokens, decoding, steps)]`.
      events: how many were processed.
    """

    ended: Int32[np.ndarray, "requests"]
    arrival_s: Float64[np.ndarray, "requests"]
    scheduled_s: Float64[np.ndarray, "requests"]
    first_s: Float64[np.ndarray, "requests"]
    decode_s: Float64[np.ndarray, "requests"]
    last_s: Float64[np.ndarray, "requests"]
    hit_blocks: Int64[np.ndarray, "requests"]
    hit_tokens: Int64[np.ndarray, "requests"]
    retries: Int32[np.ndarray, "requests"]
    prefill_worker: Int32[np.ndarray, "requests"]
    decode_worker: Int32[np.ndarray, "requests"]
    gaps: Int64[np.ndarray, "gaps"]
    gauges: Float64[np.ndarray, "bins gauges"]
    bin_s: float
    peak_kv: Int64[np.ndarray, "workers"]
    busy_s: Float64[np.ndarray, "workers"]
    spans: Float64[np.ndarray, "spans six"]
    events: int
