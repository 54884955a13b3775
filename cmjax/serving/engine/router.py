"""Which worker a request goes to.

`any-idle` keeps one queue, from which a worker takes when it ends a step: the stateless router of
the peer-to-peer architecture. The others decide when a request arrives, and it waits there.
"""

from collections import deque

from cmjax.serving.engine.inputs import ROUTERS
from cmjax.serving.engine.worker import Worker

ANY_IDLE, LEAST_LOADED, ROUND_ROBIN, CACHE_AWARE = range(len(ROUTERS))


class Router:
    """Chooses prefill or colocated workers for requests, and decode workers after their prefill."""

    def __init__(self, kind: int, prefill: list[Worker], decode: list[Worker]):
        self.kind, self.prefill, self.decode = kind, prefill, decode
        self.queue: deque[int] = deque()
        self.queued_tokens = 0
        self.turn = 0

    def enqueue(self, request: int, prompt: int) -> None:
        """Into the common queue."""
        self.queue.append(request)
        self.queued_tokens += prompt

    def choose(self, prompt: int, hits) -> Worker | None:
        """The worker that a request waits at, or None for the common queue.

        `hits(worker)`: tokens that its cache holds.
        """
        alive = [w for w in self.prefill if w.alive]
        if self.kind == ANY_IDLE or not alive:
            return None
        if self.kind == ROUND_ROBIN:
            self.turn += 1
            return alive[(self.turn - 1) % len(alive)]
        if self.kind == CACHE_AWARE:
            return min(alive, key=lambda w: (w.outstanding + prompt - hits(w), w.index))
        return min(alive, key=lambda w: (w.load(), w.index))

    def for_decode(self) -> Worker | None:
        """The least loaded decode worker."""
        alive = [w for w in self.decode if w.alive]
        return min(alive, key=lambda w: (w.load(), w.index)) if alive else None

    def share(self, now: float, prompts: list[int]) -> None:
        """Hand the common queue to idle workers, the one with the fewest tokens first."""
        while self.queue:
            free = [w for w in self.prefill if self._takes(w, now)]
            if not free:
                return
            worker = min(free, key=lambda w: (w.outstanding, w.index))
            request = self.queue.popleft()
            self.queued_tokens -= prompts[request]
            worker.waiting.append(request)
            worker.outstanding += prompts[request]

    def _takes(self, worker: Worker, now: float) -> bool:
        return (
            worker.alive
            and not worker.busy
            and now >= worker.ready_s
            and worker.outstanding < worker.max_tokens
            and len(worker.batch) + len(worker.waiting) < worker.max_requests
        )
