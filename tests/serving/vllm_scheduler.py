"""vLLM's scheduler (version 1), step by step: what the colocated engine is held against.

Blocks are numbered and are handed out from the front of one queue; a block that is let go joins its
end, the last one of a request first, and is known by its prefix until somebody takes it. A request
that is preempted starts from the blocks that are still known. The engine itself counts tokens, not
blocks, and takes steps together.
"""

from collections import OrderedDict, deque

import numpy as np

from cmjax.serving import Trace
from cmjax.serving.engine.table import Lookup


class Blocks:
    """Memory in blocks, and which of them still hold a prefix."""

    def __init__(self, count: int):
        self.free = OrderedDict.fromkeys(range(count))
        self.holds: dict[int, tuple[int, int]] = {}
        self.known: dict[tuple[int, int], int] = {}

    def take(self) -> int:
        block, _ = self.free.popitem(last=False)
        self.known.pop(self.holds.pop(block, (-1, -1)), None)
        return block

    def note(self, request: int, blocks: list[int], full: int) -> None:
        """The first `full` blocks of a request are computed."""
        for position, block in enumerate(blocks[:full]):
            if block not in self.holds:
                self.holds[block] = request, position
                self.known[request, position] = block

    def found(self, request: int, most: int) -> list[int]:
        found = [self.known.get((request, position), -1) for position in range(most)]
        return found[: found.index(-1)] if -1 in found else found

    def let_go(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.free[block] = None


def replay(trace: Trace, lookup: Lookup, *, batch: int, tokens: int, kv_tokens: int, page: int):
    """(first token, last token, preemptions) of every request, times in s."""
    prompt, output = trace.prompt.tolist(), trace.output.tolist()
    count = trace.requests
    memory = Blocks(kv_tokens // page)
    held: list[list[int]] = [[] for _ in range(count)]
    computed, answered, preempted = [0] * count, [0] * count, [0] * count
    first, last = np.zeros(count), np.zeros(count)
    waiting: deque[int] = deque()
    running: list[int] = []
    coming, now = 0, 0.0
    while coming < count or waiting or running:
        if not waiting and not running:
            now = max(now, trace.arrival_s[coming])
        while coming < count and trace.arrival_s[coming] <= now:
            waiting.append(coming)
            coming += 1
        step: list[tuple[int, int]] = []  # (request, tokens)
        budget, evicted, at = tokens, False, 0
        while at < len(running) and budget:
            request = running[at]
            chunk = min(prompt[request] + answered[request] - computed[request], budget)
            need = -(-(computed[request] + chunk) // page) - len(held[request])
            while need > len(memory.free):
                victim = running.pop()
                memory.let_go(held[victim])
                held[victim], computed[victim], evicted = [], 0, True
                preempted[victim] += 1
                waiting.appendleft(victim)
                if victim == request:
                    break
            if at == len(running):
                break
            held[request] += [memory.take() for _ in range(need)]
            step.append((request, chunk))
            budget, at = budget - chunk, at + 1
        while waiting and budget and len(running) < batch and not evicted:
            request = waiting[0]
            total = prompt[request] + answered[request]
            found = memory.found(request, (total - 1) // page)
            if -(-total // page) - sum(b not in memory.free for b in found) > len(memory.free):
                break
            waiting.popleft()
            for block in found:
                memory.free.pop(block, None)
            computed[request] = len(found) * page
            chunk = min(total - computed[request], budget)
            need = -(-(computed[request] + chunk) // page) - len(found)
            held[request] = found + [memory.take() for _ in range(need)]
            running.append(request)
            step.append((request, chunk))
            budget -= chunk
        now += _step_s(step, computed, prompt, lookup)
        for request, chunk in step:
            computed[request] += chunk
            if computed[request] == prompt[request] + answered[request]:
                answered[request] += 1
                first[request] = first[request] or now
            known = min(computed[request], prompt[request] + answered[request] - 1)
            memory.note(request, held[request], known // page)
            if answered[request] == output[request]:
                last[request] = now
                running.remove(request)
                memory.let_go(held[request])
    return first, last, np.array(preempted)


def _step_s(step, computed, prompt, lookup: Lookup) -> float:
    decoding = [(r, c) for r, c in step if c == 1 and computed[r] >= prompt[r]]
    prefills = [(r, c) for r, c in step if not (c == 1 and computed[r] >= prompt[r])]
    tokens = sum(chunk for _, chunk in prefills)
    work = sum(chunk * (2 * computed[request] + chunk) for request, chunk in prefills)
    context = sum(computed[request] for request, _ in decoding) / max(len(decoding), 1)
    return lookup.step_s(
        tokens, work / tokens if tokens else 0.0, len(decoding), context,
        tokens + len(decoding), len(step),
    )  # fmt: skip
