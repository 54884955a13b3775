"""What is recorded while the loop runs: queues over time, and gaps between tokens."""

import math

from cmjax.serving.engine.outputs import (
    GAP_BINS,
    GAP_LOW,
    GAP_PER_OCTAVE,
    GAUGES,
    MOST_BINS,
)


class Gauges:
    """Integrals of piecewise constant values over bins of equal width, which doubles whenever there
    would be more than `MOST_BINS`."""

    def __init__(self, bin_s: float):
        self.bin_s = bin_s
        self.since = [0.0] * len(GAUGES)
        self.value = [0.0] * len(GAUGES)
        self.bins: list[list[float]] = []

    def set(self, gauge: int, now: float, value: float) -> None:
        """From `now` on, a gauge has another value."""
        if value != self.value[gauge]:
            self.advance(gauge, now)
            self.value[gauge] = value

    def advance(self, gauge: int, now: float) -> None:
        """Add the time since the last change to the bins."""
        start, value = self.since[gauge], self.value[gauge]
        self.since[gauge] = now
        if value == 0.0:
            return
        while now > self.bin_s * MOST_BINS:
            self._double()
        at = int(start / self.bin_s)
        while start < now:
            edge = (at + 1) * self.bin_s
            end = min(edge, now)
            while len(self.bins) <= at:
                self.bins.append([0.0] * len(GAUGES))
            if end > start:
                self.bins[at][gauge] += value * (end - start)
            start, at = end, at + 1

    def _double(self) -> None:
        self.bin_s *= 2.0
        if len(self.bins) % 2:
            self.bins.append([0.0] * len(GAUGES))
        pairs = zip(self.bins[::2], self.bins[1::2], strict=True)
        self.bins = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]


def gap_bin(gap_s: float) -> int:
    """The bin of a gap: logarithmic, by the bits of the number, so that all machines agree."""
    if gap_s <= 0.0:
        return 0
    mantissa, exponent = math.frexp(gap_s)
    found = (exponent - 1 - GAP_LOW) * GAP_PER_OCTAVE + int((mantissa * 2.0 - 1.0) * GAP_PER_OCTAVE)
    return min(max(found, 0), GAP_BINS - 1)
