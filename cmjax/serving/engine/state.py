"""Where every request stands."""

import numpy as np

from cmjax.serving.engine.inputs import FIXED, Inputs

NOWHERE = -1.0


class Requests:
    """Requests as lists, one entry each: what they are, what they have got, and when."""

    def __init__(self, given: Inputs):
        count = len(given.arrival_s)
        self.count = count
        self.arrival_s: list[float] = given.arrival_s.tolist()
        self.asked: list[int] = given.prompt.tolist()
        self.steps: list[int] = given.steps.tolist()
        self.growth: list[int] = given.growth.tolist()
        self.block_start: list[int] = given.block_start.tolist()
        self.block: list[int] = given.block.tolist()
        self.prompt = list(
            self.asked
        )  # to prefill: what was asked, and after a retry the answer so far
        self.computed = [0] * count
        self.done = [0] * count  # decode steps
        self.kept = [0] * count  # tokens computed before a preemption, fixed point
        self.kept_until = [
            0
        ] * count  # what its worker has claimed when they begin to be overwritten
        self.joined = [0] * count  # step of the worker at which it began to decode
        self.token_s = [NOWHERE] * count  # of the last token before it began to decode
        self.worker = [-1] * count
        self.epoch = [0] * count
        self.ended = [0] * count
        self.scheduled_s = [NOWHERE] * count
        self.first_s = [NOWHERE] * count
        self.decode_s = [NOWHERE] * count
        self.last_s = [NOWHERE] * count
        self.hit_blocks = [0] * count
        self.hit_tokens = [0] * count
        self.retries = [0] * count
        self.prefill_worker = [-1] * count
        self.decode_worker = [-1] * count

    def blocks(self, request: int) -> list[int]:
        return self.block[self.block_start[request] : self.block_start[request + 1]]

    def needs(self, request: int) -> int:
        """Tokens to hold for its prompt and its next step, fixed point."""
        return (self.prompt[request] << FIXED) + self.growth[request]

    def retry(self, request: int) -> None:
        """All keys and values are lost: prompt and answer so far have to be computed again."""
        self.epoch[request] += 1
        self.retries[request] += 1
        self.computed[request] = 0
        self.worker[request] = -1
        if self.first_s[request] >= 0.0:
            answered = 1 + ((self.done[request] * self.growth[request]) >> FIXED)
            self.prompt[request] = self.asked[request] + answered

    def arrays(self) -> dict[str, np.ndarray]:
        """What goes to the outputs."""
        times = ("arrival_s", "scheduled_s", "first_s", "decode_s", "last_s")
        counts = ("ended", "retries", "prefill_worker", "decode_worker")
        return {
            **{name: np.array(getattr(self, name), float) for name in times},
            **{name: np.array(getattr(self, name), np.int32) for name in counts},
            "hit_blocks": np.array(self.hit_blocks, np.int64),
            "hit_tokens": np.array(self.hit_tokens, np.int64),
        }
