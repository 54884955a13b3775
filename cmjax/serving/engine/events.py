"""Events, in the order of their time; those of one time in the order in which they were made."""

import heapq

STEP, HANDOVER, LOSS, BACK, ARRIVAL = range(5)


class Events:
    """A queue of `(time, kind, subject, version)`."""

    def __init__(self):
        self.heap: list[tuple[float, int, int, int, int]] = []
        self.made = 0

    def push(self, time_s: float, kind: int, subject: int, version: int = 0) -> None:
        heapq.heappush(self.heap, (time_s, self.made, kind, subject, version))
        self.made += 1

    def next_s(self) -> float:
        return self.heap[0][0] if self.heap else float("inf")

    def pop(self) -> tuple[int, int, int]:
        """Kind, subject and version of the next event."""
        return heapq.heappop(self.heap)[2:]
