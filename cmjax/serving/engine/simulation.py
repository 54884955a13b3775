"""The event loop, in Python: the definition of what the C++ one does, bit for bit.

Everything of one instant happens before any worker starts a step: requests that arrive together are
batched together.
"""

from collections.abc import Callable

import numpy as np

from cmjax.serving.engine.admission import Admission
from cmjax.serving.engine.cache import Cache
from cmjax.serving.engine.events import ARRIVAL, BACK, HANDOVER, LOSS, STEP, Events
from cmjax.serving.engine.gauges import Gauges, gap_bin
from cmjax.serving.engine.inputs import DECODE, FIXED, EngineInputs
from cmjax.serving.engine.outputs import (
    COMPLETED,
    GAP_BINS,
    REJECTED,
    REJECTED_LATE,
    EngineOutputs,
)
from cmjax.serving.engine.router import ANY_IDLE, Router
from cmjax.serving.engine.scheduler import Scheduler
from cmjax.serving.engine.state import Requests
from cmjax.serving.engine.table import Lookup
from cmjax.serving.engine.worker import Worker

PROGRESS_EVERY = 1 << 16
"""Events between two calls of `progress`."""


class Simulation:
    """One run; `run` may be called once."""

    def __init__(self, given: EngineInputs):
        self.given = given
        self.requests = Requests(given.requests)
        lookups = [Lookup(table) for table in given.tables]
        kinds = given.workers.table.tolist()
        self.workers = [Worker(i, given.workers, lookups[k]) for i, k in enumerate(kinds)]
        prefill = [w for w in self.workers if w.role != DECODE]
        decode = [w for w in self.workers if w.role == DECODE]
        self.scheduler = Scheduler(self.requests, Cache(given.cache), given.cache)
        self.scheduler.on_prefilled = self._prefilled
        self.scheduler.on_done = self._done
        self.scheduler.on_lost = self._given_up
        self.router = Router(given.router, prefill, decode)
        self.admission = Admission(given, self.router)
        self.events = Events()
        self.gauges = Gauges(given.bin_s)
        self.gaps = [0] * GAP_BINS
        self.links = [[0.0] * given.links for _ in self.workers]
        self.next_rank = [0] * len(self.workers)
        self.homeless: list[int] = []  # prefilled, while no decode worker is alive
        self.spans: list[tuple[float, ...]] = []
        self.arrived = 0  # of a replayed trace
        self.ended = 0
        self.processed = 0

    def run(self, progress: Callable[[int], bool] | None = None) -> EngineOutputs:
        """Until nothing is left to happen; `progress(requests ended)` may stop it by True."""
        given, events = self.given, self.events
        for i, (lost_s, back_s) in enumerate(
            zip(given.loss_s.tolist(), given.back_s.tolist(), strict=True)
        ):
            events.push(lost_s, LOSS, i)
            events.push(back_s, BACK, int(given.loss_worker[i]))
        for worker in self.workers:
            if worker.ready_s > 0.0:
                events.push(worker.ready_s, BACK, worker.index)
        if given.clients:
            for _ in range(min(given.clients, self.requests.count)):
                self._next_client(0.0)
        report = PROGRESS_EVERY
        while self.ended < self.requests.count:
            now = min(self._next_arrival_s(), events.next_s())
            if now == float("inf"):
                break  # what waits has no worker left
            self._instant(now)
            if progress is not None and self.processed >= report:
                report = self.processed + PROGRESS_EVERY
                if progress(self.ended):
                    raise KeyboardInterrupt
        return self._outputs()

    def _next_arrival_s(self) -> float:
        if self.given.clients or self.arrived == self.requests.count:
            return float("inf")
        return self.requests.arrival_s[self.arrived]

    def _instant(self, now: float) -> None:
        """All that happens at `now`, then the steps that start then."""
        while self._next_arrival_s() <= now:
            self.arrived += 1
            self._arrive(self.arrived - 1, now)
        while self.events.next_s() <= now:
            self._happen(*self.events.pop(), now)
        self.router.share(now, self.requests.prompt)
        for worker in self.workers:
            if not worker.alive or now < worker.ready_s:
                continue
            if worker.busy:
                self._cut_short(worker, now)
            elif (worker.waiting or worker.batch) and self.scheduler.start(worker, now):
                self.events.push(worker.end_s, STEP, worker.index, worker.version)
        self._gauge(now)

    def _happen(self, kind: int, subject: int, version: int, now: float) -> None:
        self.processed += 1
        if kind == ARRIVAL:
            self._arrive(subject, now)
        elif kind == STEP:
            worker = self.workers[subject]
            if worker.version == version and worker.busy:
                self._count(worker, now)
                self.scheduler.end(worker, now)
        elif kind == HANDOVER:
            self._handed_over(subject, version, now)
        elif kind == LOSS:
            self._lose(self.workers[int(self.given.loss_worker[subject])], now)
        elif kind == BACK:
            self._back(self.workers[subject], now)

    def _arrive(self, request: int, now: float) -> None:
        self.processed += 1
        self.requests.arrival_s[request] = now
        self.admission.pending += 1
        if not self.admission.on_arrival(self.requests.prompt[request]):
            self.admission.pending -= 1
            self._end(request, REJECTED, now)
            return
        self._dispatch(request, now)

    def _dispatch(self, request: int, now: float) -> None:
        """To a worker that will compute its prompt."""
        prompt = self.requests.prompt[request]

        def hits(worker):
            given = self.given.cache
            if not given.stores:
                return 0
            blocks = self.requests.blocks(request)
            found = self.scheduler.cache.peek(self.scheduler.store(worker), blocks)
            return min(found * given.block_tokens, prompt - 1)

        worker = self.router.choose(prompt, hits)
        if worker is None:
            self.router.enqueue(request, prompt)
        else:
            worker.waiting.append(request)
            worker.outstanding += prompt

    def _prefilled(self, worker: Worker, request: int, now: float) -> None:
        """Hand keys and values over to a decode worker, on the link that the connection mapping
        gives its rank: source = rank x links / ranks, rounded down."""
        if not self.admission.after_prefill():
            self.admission.pending -= 1
            self._end(request, REJECTED_LATE, now)
            return
        target = self.router.for_decode()
        if target is None:
            self.homeless.append(request)
            return
        rank = self.next_rank[target.index]
        self.next_rank[target.index] = (rank + 1) % target.ranks
        link = rank * self.given.links // target.ranks
        links = self.links[worker.index]
        start_s = max(now, links[link])
        links[link] = start_s + float(self.requests.prompt[request]) * self.given.handover_s
        self.requests.worker[request] = target.index
        target.coming += 1
        self.events.push(
            links[link] + self.given.handover_latency_s,
            HANDOVER,
            request,
            self.requests.epoch[request],
        )

    def _handed_over(self, request: int, epoch: int, now: float) -> None:
        target = self.workers[self.requests.worker[request]]
        target.coming -= 1
        if not target.alive:
            self.requests.retry(request)
            self._dispatch(request, now)
            return
        self.admission.pending -= 1
        target.waiting.append(request)

    def _given_up(self, request: int, now: float) -> None:
        """A decode worker has lost what it held of a request."""
        self.admission.pending += 1
        self._dispatch(request, now)

    def _done(self, request: int, now: float) -> None:
        requests = self.requests
        requests.last_s[request] = now
        if self.workers[requests.worker[request]].role != DECODE:
            self.admission.pending -= 1
        else:
            self.admission.decoded += 1
            self.admission.decoded_s += now - requests.decode_s[request]
        self._end(request, COMPLETED, now)

    def _end(self, request: int, how: int, now: float) -> None:
        self.requests.ended[request] = how
        self.ended += 1
        if self.given.clients:
            self._next_client(now + self.given.think_s)

    def _next_client(self, now: float) -> None:
        if self.arrived < self.requests.count:
            self.events.push(now, ARRIVAL, self.arrived)
            self.arrived += 1

    def _lose(self, worker: Worker, now: float) -> None:
        worker.alive = False
        for request in self.scheduler.lose(worker, now):
            if worker.role == DECODE:
                self._given_up(request, now)
            else:
                self._dispatch(request, now)

    def _back(self, worker: Worker, now: float) -> None:
        worker.alive = True
        homeless, self.homeless = self.homeless, []
        for request in homeless:
            self._prefilled(self.workers[self.requests.prefill_worker[request]], request, now)
        if self.router.kind != ANY_IDLE:
            queue = list(self.router.queue)
            self.router.queue.clear()
            self.router.queued_tokens = 0
            for request in queue:
                self._dispatch(request, now)

    def _cut_short(self, worker: Worker, now: float) -> None:
        """End a worker's steps early where somebody waits who could join."""
        waits = self.scheduler.joinable(worker)
        if not waits and worker.prefills and self.router.queue and not worker.waiting:
            waits = worker.fits(self.requests.needs(self.router.queue[0]))
        if waits and self.scheduler.truncate(worker, now):
            self.events.push(worker.end_s, STEP, worker.index, worker.version)

    def _count(self, worker: Worker, now: float) -> None:
        """Gaps between tokens, and the busy interval."""
        if worker.decoding:
            gap_s = (now - worker.start_s) / float(worker.steps)
            self.gaps[gap_bin(gap_s)] += worker.decoding * worker.steps - len(worker.joiners)
            for request in worker.joiners:  # what it waited for its place is in its first gap
                first_s = worker.start_s + gap_s - self.requests.token_s[request]
                self.gaps[gap_bin(first_s)] += 1
            worker.joiners = []
        if len(self.spans) < self.given.record:
            self.spans.append((
                float(worker.index), worker.start_s, now, float(sum(worker.chunks)),
                float(worker.decoding), float(worker.steps),
            ))  # fmt: skip

    def _gauge(self, now: float) -> None:
        queued, busy, ready, running, decode_busy, kv = len(self.router.queue), 0, 0, 0, 0, 0
        for worker in self.workers:
            if worker.role == DECODE:
                ready += len(worker.waiting) + worker.coming
                decode_busy += worker.busy
                kv += worker.kv_decode >> FIXED
            else:
                queued += len(worker.waiting)
                busy += worker.busy
                kv += (worker.kv_decode + worker.kv_prefill) >> FIXED
            running += worker.decoding
        for gauge, value in enumerate((queued, busy, ready, running, decode_busy, kv)):
            self.gauges.set(gauge, now, float(value))

    def _outputs(self) -> EngineOutputs:
        end_s = max(self.requests.last_s, default=0.0)
        for gauge in range(len(self.gauges.value)):
            self.gauges.advance(gauge, max(end_s, self.gauges.since[gauge]))
        return EngineOutputs(
            **self.requests.arrays(),
            gaps=np.array(self.gaps, np.int64),
            gauges=np.array(self.gauges.bins, float).reshape(-1, len(self.gauges.value)),
            bin_s=self.gauges.bin_s,
            peak_kv=np.array([w.peak_kv for w in self.workers], np.int64),
            busy_s=np.array([w.busy_s for w in self.workers]),
            spans=np.array(self.spans, float).reshape(-1, 6),
            events=self.processed,
        )
