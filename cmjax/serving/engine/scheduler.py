"""Continuous batching: what a worker does in its next steps, and what their end changes.

The rules are vLLM's (version 1): running requests first, each decoding one token or prefilling one
chunk, then waiting ones while tokens, places and memory are left; where memory for the next tokens
is missing, the request that was admitted last is preempted and computed again later. While nothing
prefills and nobody can join, steps differ only in their context: they are taken together, at the
time of the middle one, until a request is done, memory is full or somebody can join.
"""

import heapq
from collections.abc import Callable

from cmjax.serving.engine.cache import Cache
from cmjax.serving.engine.inputs import COLOCATED, FIXED, CacheInputs
from cmjax.serving.engine.state import Requests
from cmjax.serving.engine.worker import Worker

MOST_STEPS = 64
"""Steps that are taken together at most: their common time is that of the middle one."""


class Scheduler:
    """Acts on workers; what leaves a worker is handed to the three callbacks.

    `on_prefilled(worker, request, now)` for the next stage, `on_done(request, now)` and
    `on_lost(request, now)` for a request whose keys and values a worker without prefill gave up.
    """

    def __init__(self, requests: Requests, cache: Cache, given: CacheInputs):
        self.requests, self.cache, self.given = requests, cache, given
        self.on_prefilled: Callable[[Worker, int, float], None] = _nothing
        self.on_done: Callable[[int, float], None] = _nothing
        self.on_lost: Callable[[int, float], None] = _nothing

    def store(self, worker: Worker) -> int:
        return worker.index if self.given.stores > 1 else 0

    def joinable(self, worker: Worker) -> bool:
        """Whether the first that waits could be in the next step."""
        if not worker.waiting:
            return False
        return worker.fits(self.requests.needs(worker.waiting[0]))

    def start(self, worker: Worker, now: float) -> bool:
        """Plan the next steps; False if there is nothing to do."""
        preempted = self._make_room(worker, now)
        tokens, work, fetch_s = self._continue_prefills(worker)
        if not preempted:
            tokens, work, fetch_s = self._admit(worker, now, tokens, work)
        if tokens == 0 and worker.decoding == 0:
            return False
        pause_s = self._pause(worker, now)
        steps = 1
        if tokens == 0 and pause_s == 0.0:
            steps = min(worker.next_finish(self.requests.epoch) - worker.step, MOST_STEPS)
            if worker.growth:
                steps = min(steps, (worker.capacity - worker.kv) // worker.growth)
        sequences = worker.decoding + len(worker.chunks)
        each = worker.step_s(tokens, work, sequences, steps)
        if worker.pause_s > 0.0 and steps > 1:
            until_s = float(worker.pauses + 1) * worker.pause_every_s - now
            steps = min(steps, int(until_s / each) + 1)
        duration = float(steps) * each
        worker.busy = True
        worker.version += 1
        worker.steps = steps
        worker.start_s = now
        worker.end_s = now + (duration + fetch_s + pause_s)
        return True

    def truncate(self, worker: Worker, now: float) -> bool:
        """End the steps at the next boundary, for somebody to join; False if they end there."""
        if worker.steps == 1:
            return False
        each = (worker.end_s - worker.start_s) / float(worker.steps)
        steps = int((now - worker.start_s) / each) + 1
        if steps >= worker.steps:
            return False
        worker.steps = steps
        worker.end_s = max(worker.start_s + float(steps) * each, now)
        worker.version += 1
        return True

    def end(self, worker: Worker, now: float) -> None:
        """Take note of the steps that have ended."""
        requests = self.requests
        worker.busy = False
        worker.busy_s += now - worker.start_s
        worker.step += worker.steps
        worker.kv_decode += worker.growth * worker.steps
        worker.claimed += worker.growth * worker.steps
        worker.peak_kv = max(worker.peak_kv, worker.kv)
        while worker.next_finish(requests.epoch) <= worker.step:
            _, request, _ = heapq.heappop(worker.finishes)
            self._leave_decode(worker, request)
            self.on_done(request, now)
        chunks = zip(list(worker.prefilling), worker.chunks, strict=False)
        for request, chunk in list(chunks):
            requests.computed[request] += chunk
            worker.outstanding -= chunk
            if requests.computed[request] == requests.prompt[request]:
                self._prefilled(worker, request, now)
        worker.chunks = []

    def lose(self, worker: Worker, now: float) -> list[int]:
        """The worker is gone: the requests that were with it, which have lost all it held."""
        if worker.busy:
            each = (worker.end_s - worker.start_s) / float(worker.steps)
            steps = min(int((now - worker.start_s) / each), worker.steps - 1)
            worker.step += steps
            worker.kv_decode += steps * worker.growth
            worker.busy_s += now - worker.start_s
        worker.busy = False
        worker.version += 1
        worker.chunks = []
        worker.joiners = []
        lost = list(worker.batch)
        for request in lost:
            self._evict(worker, request, now)
        lost += worker.waiting
        for request in worker.waiting:
            if worker.prefills:
                worker.outstanding -= self.requests.prompt[request]
            else:
                self.requests.retry(request)
        worker.waiting.clear()
        return lost

    def _make_room(self, worker: Worker, now: float) -> bool:
        """Preempt until the next token of all that decode fits."""
        preempted = False
        while worker.decoding and worker.kv + worker.growth > worker.capacity:
            request = next(reversed(worker.batch))
            free, held = worker.capacity - worker.kv, worker.kv
            self._evict(worker, request, now)
            preempted = True
            if worker.role == COLOCATED:
                if worker.keeps:
                    self.requests.kept[request] = held - worker.kv - worker.waste
                    self.requests.kept_until[request] = worker.claimed + free
                worker.waiting.appendleft(request)
                worker.outstanding += self.requests.prompt[request]
            else:
                self.on_lost(request, now)
        return preempted

    def _continue_prefills(self, worker: Worker) -> tuple[int, int, float]:
        tokens = work = 0
        worker.chunks = []
        budget = worker.max_tokens - worker.decoding * worker.lookup.decode_tokens
        for request in worker.prefilling:
            computed = self.requests.computed[request]
            chunk = min(self.requests.prompt[request] - computed, budget - tokens, worker.chunk)
            if chunk <= 0:
                break
            tokens += chunk
            work += chunk * (2 * computed + chunk)
            worker.chunks.append(chunk)
        return tokens, work, 0.0

    def _admit(self, worker: Worker, now: float, tokens: int, work: int) -> tuple[int, int, float]:
        requests = self.requests
        budget = worker.max_tokens - worker.decoding * worker.lookup.decode_tokens
        memory_tokens = disk_tokens = 0
        while self.joinable(worker):
            if not worker.prefills:
                self._join_decode(worker, worker.waiting.popleft(), now)
                continue
            if tokens >= budget or len(worker.chunks) < len(worker.prefilling):
                break
            request = worker.waiting.popleft()
            if requests.kept[request]:
                self._find_kept(worker, request)
            elif self.given.stores:
                found = self._fetch(worker, request)
                memory_tokens, disk_tokens = memory_tokens + found[0], disk_tokens + found[1]
            if requests.scheduled_s[request] < 0.0:
                requests.scheduled_s[request] = now
            requests.prefill_worker[request] = worker.index
            requests.worker[request] = worker.index
            worker.batch[request] = None
            worker.prefilling.append(request)
            worker.kv_prefill += requests.prompt[request] << FIXED
            computed = requests.computed[request]
            worker.claimed += (requests.prompt[request] - computed) << FIXED
            chunk = min(requests.prompt[request] - computed, budget - tokens, worker.chunk)
            tokens += chunk
            work += chunk * (2 * computed + chunk)
            worker.chunks.append(chunk)
        fetch_s = 0.0
        if memory_tokens + disk_tokens > 0:
            fetch_s = (
                self.given.latency_s
                + float(memory_tokens) * self.given.memory_s
                + float(disk_tokens) * self.given.disk_s
            )
        return tokens, work, fetch_s

    def _find_kept(self, worker: Worker, request: int) -> None:
        """What a preempted request had computed, as far as nobody has claimed its memory: memory is
        claimed in the order in which it was freed, and of a request from the end."""
        requests = self.requests
        gone = max(worker.claimed - requests.kept_until[request], 0)
        kept = max(requests.kept[request] - gone, 0) >> FIXED
        requests.kept[request] = 0
        requests.computed[request] = min(kept, requests.prompt[request] - 1)
        worker.outstanding -= requests.computed[request]

    def _fetch(self, worker: Worker, request: int) -> tuple[int, int]:
        """Take leading blocks from the cache: tokens from memory and from disk."""
        requests, size = self.requests, self.given.block_tokens
        hits, from_disk = self.cache.fetch(self.store(worker), requests.blocks(request))
        tokens = min(hits * size, requests.prompt[request] - 1)  # the last one gives the answer
        if requests.scheduled_s[request] < 0.0:
            requests.hit_blocks[request] = hits
            requests.hit_tokens[request] = tokens
        requests.computed[request] = tokens
        worker.outstanding -= tokens
        disk = min(from_disk * size, tokens)
        return tokens - disk, disk

    def _pause(self, worker: Worker, now: float) -> float:
        if worker.pause_s == 0.0:
            return 0.0
        due = int(now / worker.pause_every_s)
        if due <= worker.pauses:
            return 0.0
        worker.pauses = due
        return worker.pause_s

    def _prefilled(self, worker: Worker, request: int, now: float) -> None:
        """The prompt is computed, and one more token known."""
        requests = self.requests
        worker.prefilling.remove(request)
        worker.kv_prefill -= requests.prompt[request] << FIXED
        if self.given.stores:
            for block in requests.blocks(request):
                self.cache.insert(self.store(worker), block)
        if requests.first_s[request] < 0.0:
            requests.first_s[request] = now
        else:  # computed again: the token that it gives is one of the answer
            requests.done[request] += 1
        requests.token_s[request] = now
        if requests.done[request] >= requests.steps[request]:
            del worker.batch[request]
            self.on_done(request, now)
        elif worker.role == COLOCATED:
            self._join_decode(worker, request, now)  # its place in the batch stays the same
        else:
            del worker.batch[request]
            self.on_prefilled(worker, request, now)

    def _join_decode(self, worker: Worker, request: int, now: float) -> None:
        requests = self.requests
        if requests.decode_s[request] < 0.0:
            requests.decode_s[request] = now
        requests.decode_worker[request] = worker.index
        requests.worker[request] = worker.index
        requests.joined[request] = worker.step
        worker.joiners.append(request)
        worker.batch[request] = None
        worker.decoding += 1
        worker.kv_decode += requests.prompt[request] << FIXED
        worker.growth += requests.growth[request]
        worker.peak_kv = max(worker.peak_kv, worker.kv)
        finish = worker.step + requests.steps[request] - requests.done[request]
        heapq.heappush(worker.finishes, (finish, request, requests.epoch[request]))

    def _leave_decode(self, worker: Worker, request: int) -> None:
        requests = self.requests
        steps = worker.step - requests.joined[request]
        growth = requests.growth[request]
        worker.decoding -= 1
        worker.kv_decode -= (requests.prompt[request] << FIXED) + steps * growth
        worker.growth -= growth
        requests.done[request] += steps
        del worker.batch[request]

    def _evict(self, worker: Worker, request: int, now: float) -> None:
        """Take a request out of the batch, with nothing computed."""
        requests = self.requests
        if request in worker.prefilling:
            worker.prefilling.remove(request)
            worker.kv_prefill -= requests.prompt[request] << FIXED
            worker.outstanding -= requests.prompt[request] - requests.computed[request]
            del worker.batch[request]
        else:
            self._leave_decode(worker, request)
            requests.token_s[request] = now
        requests.retry(request)


def _nothing(*_) -> None:
    """Nobody waits for what leaves the worker."""
