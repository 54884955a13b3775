"""A trace: when requests arrive, how long they are, and which prefixes they share."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int32, Int64

MOST_S = 1e12
"""The last second of a trace: beyond it, sums lose the milliseconds of a step."""
_NUMBER_BYTES, _PART = 5, 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Requests in the order of arrival.

    Fields:
      arrival_s: seconds from the first one's clock, not decreasing.
      prompt, output: tokens, at least 1.
      block_start, block: request i has the prefix blocks `block[block_start[i]:block_start[i +
        1]]`; equal numbers are equal prefixes. Numbered from 0 without gaps; empty where nothing is
        known of prefixes.
      block_tokens: tokens of a block.
      source: where it is from, for messages.
    Raises: ValueError: times that decrease or are negative, lengths below 1, blocks that do not
      match; the request is named, counted from 1.
    """

    arrival_s: Float64[np.ndarray, "requests"]
    prompt: Int64[np.ndarray, "requests"]
    output: Int64[np.ndarray, "requests"]
    block_start: Int64[np.ndarray, "requests+1"]
    block: Int32[np.ndarray, "blocks"]
    block_tokens: int = 512
    source: str = "trace"

    def __post_init__(self):
        count = len(self.arrival_s)
        if count == 0:
            raise ValueError(f"{self.source}: no requests")
        if not len(self.prompt) == len(self.output) == len(self.block_start) - 1 == count:
            raise ValueError(f"{self.source}: columns of different lengths")
        first = self.arrival_s[0]
        if not np.isfinite(self.arrival_s).all() or first < 0:
            at = int(np.argmax(~np.isfinite(self.arrival_s) | (self.arrival_s < 0)))
            raise ValueError(
                f"{self.source}: request {at + 1} arrives at {self.arrival_s[at]:g} s; times start "
                "at 0 or later"
            )
        if self.arrival_s.max() > MOST_S:
            raise ValueError(
                f"{self.source}: a request arrives at {self.arrival_s.max():g} s; times end before "
                f"{MOST_S:g} s"
            )
        early = np.flatnonzero(np.diff(self.arrival_s) < 0)
        if early.size:
            at = int(early[0]) + 1
            raise ValueError(
                f"{self.source}: request {at + 1} arrives at {self.arrival_s[at]:g} s, before the "
                f"one above it ({self.arrival_s[at - 1]:g} s); sort the trace by time"
            )
        for name, of in (("prompt", self.prompt), ("output", self.output)):
            if (of < 1).any():
                at = int(np.argmax(of < 1))
                raise ValueError(
                    f"{self.source}: request {at + 1} has {name} {of[at]} tokens; "
                    "at least 1 is needed"
                )
        if self.has_blocks:
            blocks, needed = np.diff(self.block_start), -(-self.prompt // self.block_tokens)
            wrong = np.flatnonzero(blocks != needed)
            if wrong.size:
                at = int(wrong[0])
                raise ValueError(
                    f"{self.source}: request {at + 1} has {blocks[at]} blocks for a prompt of "
                    f"{self.prompt[at]} tokens; at {self.block_tokens} tokens a block it needs "
                    f"{needed[at]}"
                )

    @property
    def requests(self) -> int:
        return len(self.arrival_s)

    @property
    def has_blocks(self) -> bool:
        """Whether prefixes are known."""
        return self.block.size > 0

    @property
    def blocks(self) -> int:
        """Different blocks."""
        return int(self.block.max()) + 1 if self.has_blocks else 0

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return float(self.arrival_s[-1] - self.arrival_s[0])

    @property
    def rate(self) -> float:
        """Requests per second, offered; infinite where all arrive at once."""
        return (self.requests - 1) / self.duration_s if self.duration_s else float("inf")

    def first(self, requests: int) -> "Trace":
        """The first so many requests.

        Raises: ValueError: fewer than one.
        """
        if requests < 1:
            raise ValueError(f"requests must be at least 1, got {requests}")
        count = min(requests, self.requests)
        block = self.block[: self.block_start[count]]
        return dataclasses.replace(
            self,
            arrival_s=self.arrival_s[:count],
            prompt=self.prompt[:count],
            output=self.output[:count],
            block_start=self.block_start[: count + 1],
            block=compact(block),
        )

    def faster(self, scale: float) -> "Trace":
        """The same requests, `scale` times as many per second.

        Raises: ValueError: a scale that is not positive.
        """
        if not 0 < scale < float("inf"):
            raise ValueError(f"rate-scale must be positive, got {scale:g}")
        return dataclasses.replace(self, arrival_s=self.arrival_s / scale)

    def repeated(self, times: int) -> "Trace":
        """The trace so many times in a row; no copy shares a prefix with another one."""
        if times == 1:
            return self
        step_s = self.duration_s * self.requests / max(self.requests - 1, 1) or 1.0
        copy = np.arange(times)
        ends = self.block_start[1:] + (copy * len(self.block))[:, None]
        return dataclasses.replace(
            self,
            arrival_s=(self.arrival_s + (copy * step_s)[:, None]).ravel(),
            prompt=np.tile(self.prompt, times),
            output=np.tile(self.output, times),
            block_start=np.concatenate([[0], ends.ravel()]),
            block=(self.block + (copy * self.blocks)[:, None]).ravel().astype(np.int32),
        )

    def at_rate(self, rate: float, seed: int = 0) -> "Trace":
        """The same requests as a Poisson process of `rate` requests per second.

        Raises: ValueError: a rate that is not positive.
        """
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate must be positive, got {rate:g}")
        gaps = np.random.default_rng(seed).exponential(1 / rate, self.requests)
        return dataclasses.replace(self, arrival_s=np.cumsum(gaps))

    def spread(self, seed: int = 0) -> "Trace":
        """Times of a coarse clock spread out: requests of one tick are put at random times before
        the next one, in their order."""
        ticks, tick = np.unique(self.arrival_s, return_inverse=True)
        if len(ticks) < 2:
            return self
        width = np.append(np.diff(ticks), np.median(np.diff(ticks)))
        inside = np.random.default_rng(seed).random(self.requests)
        order = np.lexsort((inside, tick))
        return dataclasses.replace(self, arrival_s=ticks[tick] + inside[order] * width[tick])


def compact(block) -> Int32[np.ndarray, "blocks"]:
    """Block ids numbered from 0 without gaps, in the order of the ids.

    Besides what is given and returned, it holds 5 bytes for every number between the least and the
    largest id, or, where these lie far apart, sorted copies of the ids.

    >>> compact([70, -5, 70, 9]).tolist()
    [2, 0, 2, 1]
    """
    ids = np.asarray(block).reshape(-1)
    found = np.empty(len(ids), np.int32)
    if not len(ids):
        return found
    least = int(ids.min())
    width = int(ids.max()) - least + 1
    if _NUMBER_BYTES * width <= ids.dtype.itemsize * len(ids):
        seen = np.zeros(width, bool)
        for part in _parts(len(ids)):
            seen[ids[part] - least] = True
        number = np.cumsum(seen, dtype=np.int32)
        for part in _parts(len(ids)):
            found[part] = number[ids[part] - least] - 1
        return found
    known = np.sort(ids)
    first = np.append(True, known[1:] != known[:-1])
    known = known[first]
    for part in _parts(len(ids)):
        found[part] = np.searchsorted(known, ids[part])
    return found


def _parts(count: int) -> Iterator[slice]:
    """Pieces of a long array, so that what is computed of it takes little memory."""
    for at in range(0, count, _PART):
        yield slice(at, at + _PART)


def without_blocks(requests: int) -> dict[str, np.ndarray]:
    """The fields of a trace of which no prefixes are known."""
    return {"block_start": np.zeros(requests + 1, np.int64), "block": np.zeros(0, np.int32)}
