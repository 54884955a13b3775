"""What the event loop is told: requests, workers, cache and policies as plain arrays.

Nothing in the loop is random: what is drawn (arrivals, accepted drafts) is drawn before it starts.
Tokens that a worker holds are counted in fixed point, `FIXED` bits behind the point, so that sums
over a changing batch stay exact and do not depend on the order of events.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int32, Int64

FIXED = 20
"""Bits behind the point of a fixed-point number of tokens."""
PREFILL, DECODE, COLOCATED = 0, 1, 2
"""What a worker does with a request: its first token, the others, or both."""
ROUTERS = ("any-idle", "least-loaded", "round-robin", "cache-aware")
ADMISSIONS = ("none", "late", "early", "predictive")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Requests by arrival.

    Fields:
      arrival_s: not decreasing. prompt, output: tokens, both at least 1.
      steps: decode steps after the first token; growth: tokens per step, fixed point.
      block_start, block: request i has blocks `block[block_start[i]:block_start[i + 1]]`, numbered
        from 0 over all requests.
    """

    arrival_s: Float64[np.ndarray, "requests"]
    prompt: Int64[np.ndarray, "requests"]
    output: Int64[np.ndarray, "requests"]
    steps: Int64[np.ndarray, "requests"]
    growth: Int64[np.ndarray, "requests"]
    block_start: Int64[np.ndarray, "requests+1"]
    block: Int32[np.ndarray, "blocks"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WorkerInputs:
    """Workers, one entry each.

    Fields:
      role: `PREFILL`, `DECODE` or `COLOCATED`. table: which of the step-time tables is its own.
      ranks: data-parallel ranks that decoding requests spread over, evenly.
      max_requests: in a batch. max_tokens: in a step. chunk: prompt tokens of one request in a
      step. capacity: tokens of keys and values that it holds, fixed point; 0 is no limit.
      waste: of it, what a request loses to half-filled pages, fixed point.
      keeps: 1 where what a preempted request computed stays until its memory is claimed.
      start_s: when it is ready. pause_every_s, pause_s: a pause of steps, at most once every so
        long (0: none).
    """

    role: Int32[np.ndarray, "workers"]
    table: Int32[np.ndarray, "workers"]
    ranks: Int32[np.ndarray, "workers"]
    max_requests: Int64[np.ndarray, "workers"]
    max_tokens: Int64[np.ndarray, "workers"]
    chunk: Int64[np.ndarray, "workers"]
    capacity: Int64[np.ndarray, "workers"]
    waste: Int64[np.ndarray, "workers"]
    keeps: Int64[np.ndarray, "workers"]
    start_s: Float64[np.ndarray, "workers"]
    pause_every_s: Float64[np.ndarray, "workers"]
    pause_s: Float64[np.ndarray, "workers"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CacheInputs:
    """The context cache.

    Fields:
      stores: 0 without a cache, 1 for one that all workers share, or one per worker.
      blocks: how many different ones there are. block_tokens: tokens of one.
      node: where each block lives, of a store's nodes. memory, disk: blocks that a node of each
        store holds in memory, and behind it.
      memory_s, disk_s: per token fetched. latency_s: of a fetch.
    """

    stores: int = 0
    blocks: int = 0
    block_tokens: int = 512
    node: Int32[np.ndarray, "blocks"]
    memory: Int64[np.ndarray, "nodes"]
    disk: Int64[np.ndarray, "nodes"]
    memory_s: float = 0.0
    disk_s: float = 0.0
    latency_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EngineInputs:
    """All that the event loop is told.

    Fields:
      requests, workers, cache: see there.
      tables: step times (`engine.table.Table`), which workers name by position.
      router: of `ROUTERS`. admission: of `ADMISSIONS`.
      slo_ttft_s: what admission control keeps; decode_limit: requests per decode worker that it
        admits; prefill_tokens_per_s: of one worker, for its estimates.
      handover_s: per token on one link. handover_latency_s: of one hand-over. links: of a prefill
        worker.
      clients: of a closed loop, 0 for arrivals as they are recorded; think_s: between a client's
        requests.
      loss_s, loss_worker, back_s: a worker is lost at `loss_s` and ready again at `back_s`.
      bin_s: width of the bins in which queues are recorded; a long run has wider ones.
      record: how many busy intervals of workers to keep.
    """

    requests: Inputs
    workers: WorkerInputs
    cache: CacheInputs
    tables: tuple
    router: int = 0
    admission: int = 0
    slo_ttft_s: float = float("inf")
    decode_limit: int = 0
    prefill_tokens_per_s: float = 1.0
    handover_s: float = 0.0
    handover_latency_s: float = 0.0
    links: int = 1
    clients: int = 0
    think_s: float = 0.0
    loss_s: Float64[np.ndarray, "losses"]
    loss_worker: Int32[np.ndarray, "losses"]
    back_s: Float64[np.ndarray, "losses"]
    bin_s: float = 1.0
    record: int = 0
