"""A worker's batch: who is in it, what it holds, and the step that it is in."""

import heapq
from collections import deque

from cmjax.serving.engine.inputs import DECODE, PREFILL
from cmjax.serving.engine.table import Lookup

NEVER = 1 << 62


class Worker:
    """State of one worker.

    The batch is a list in the order of admission (the last one is preempted first); requests in it
    either prefill, in `prefilling`, or decode.
    """

    def __init__(self, index: int, workers, lookup: Lookup):
        self.index = index
        self.role = int(workers.role[index])
        self.lookup = lookup
        self.ranks = int(workers.ranks[index])
        self.max_requests = int(workers.max_requests[index])
        self.max_tokens = int(workers.max_tokens[index])
        self.chunk = int(workers.chunk[index]) or NEVER
        self.capacity = int(workers.capacity[index]) or NEVER
        self.waste = int(workers.waste[index])
        self.keeps = bool(workers.keeps[index])
        self.claimed = 0  # tokens of memory taken so far, fixed point
        self.ready_s = float(workers.start_s[index])
        self.pause_every_s = float(workers.pause_every_s[index])
        self.pause_s = float(workers.pause_s[index])
        self.pauses = 0
        self.alive = True
        self.waiting: deque[int] = deque()
        self.batch: dict[int, None] = {}
        self.prefilling: list[int] = []
        self.chunks: list[int] = []  # of the step that runs, one per request that prefills
        self.decoding = 0
        self.joiners: list[int] = []  # whose first decode step is the one that runs
        self.finishes: list[tuple[int, int, int]] = []  # (step, request, epoch)
        self.step = 0
        self.kv_decode = 0
        self.kv_prefill = 0
        self.growth = 0
        self.outstanding = 0  # prompt tokens that wait or are being computed
        self.coming = 0  # requests on their way here
        self.busy = False
        self.version = 0
        self.start_s = 0.0
        self.end_s = 0.0
        self.steps = 0
        self.peak_kv = 0
        self.busy_s = 0.0

    @property
    def prefills(self) -> bool:
        return self.role != DECODE

    @property
    def kv(self) -> int:
        """Tokens held, fixed point, with what half-filled pages waste."""
        return self.kv_decode + self.kv_prefill + len(self.batch) * self.waste

    def fits(self, tokens: int) -> bool:
        """Whether one more request, of `tokens` in fixed point, can be admitted."""
        if len(self.batch) >= self.max_requests:
            return False
        return self.kv + tokens + self.waste + self.growth <= self.capacity

    def load(self) -> int:
        """What the least-loaded router compares: tokens to prefill, or requests."""
        if self.role == PREFILL:
            return self.outstanding
        return len(self.batch) + len(self.waiting) + self.coming

    def next_finish(self, epoch: list[int]) -> int:
        """The step at whose end the next request is done."""
        while self.finishes and epoch[self.finishes[0][1]] != self.finishes[0][2]:
            heapq.heappop(self.finishes)
        return self.finishes[0][0] if self.finishes else NEVER

    def step_s(self, tokens: int, work: int, sequences: int, steps: int) -> float:
        """Seconds of a step of this batch, the middle one of `steps`."""
        length = float(work) / float(tokens) if tokens else 0.0
        context = 0.0
        if self.decoding:
            middle = self.kv_decode + self.growth * (steps - 1) // 2
            context = float(middle) / float(self.decoding << 20)
        per_rank = (self.decoding + self.ranks - 1) // self.ranks
        total = tokens + self.decoding * self.lookup.decode_tokens
        return self.lookup.step_s(tokens, length, per_rank, context, total, sequences)
