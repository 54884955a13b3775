"""Admission control: which requests are refused, and when.

`late` refuses after the prefill, where the decode workers are full by then: its prefill was in
vain. `early` looks at the load of the decode workers when a request arrives, and not at those that
are still in prefill: the loads of the two pools then swing in antiphase (Mooncake, FAST'25, section
7). `predictive` estimates the load at the time when the prefill will have ended.
"""

from cmjax.serving.engine.inputs import ADMISSIONS, EngineInputs
from cmjax.serving.engine.router import Router

NONE, LATE, EARLY, PREDICTIVE = range(len(ADMISSIONS))


class Admission:
    """Decides by the load of the pools."""

    def __init__(self, given: EngineInputs, router: Router):
        self.kind = given.admission
        self.slo_ttft_s = given.slo_ttft_s
        self.limit = given.decode_limit
        self.rate = given.prefill_tokens_per_s
        self.router, self.prefill, self.decode = router, router.prefill, router.decode
        self.pending = 0  # requests between arrival and a decode worker
        self.decoded, self.decoded_s = 0, 0.0

    def on_arrival(self, prompt: int) -> bool:
        """Whether to take a request that arrives."""
        if self.kind in (NONE, LATE):
            return True
        alive = sum(w.alive for w in self.prefill)
        if alive == 0:
            return False
        queued = self.router.queued_tokens
        for worker in self.prefill:
            queued += worker.outstanding
        wait_s = float(queued + prompt) / (float(alive) * self.rate)
        if wait_s > self.slo_ttft_s:
            return False
        if not self.decode:
            return True
        running = float(self._running())
        if self.kind == PREDICTIVE:
            if self.decoded:
                mean_s = self.decoded_s / float(self.decoded)
                left = 1.0 - wait_s / mean_s if wait_s < mean_s else 0.0
                running = running * left
            running = running + float(self.pending)
        return running < self._room()

    def after_prefill(self) -> bool:
        """Whether to decode a request whose prefill has ended."""
        return self.kind != LATE or float(self._running()) < self._room()

    def _running(self) -> int:
        return sum(len(w.batch) + len(w.waiting) for w in self.decode)

    def _room(self) -> float:
        return float(self.limit * sum(w.alive for w in self.decode))
