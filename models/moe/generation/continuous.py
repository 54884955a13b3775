"""Continuous batching: requests of different lengths join and leave a batch between steps.

A batch has places. Between two decode steps a request that has all its tokens leaves its place, and
one that waits is prefilled and takes it, so that no request waits for the longest of a batch
(Yu et al. 2022, "Orca", section 3.1: iteration-level scheduling).

A step's work follows who runs: the cache holds all places, half of them, a quarter and so on, the
fewest that will do. Where fewer requests run, they move together into a smaller cache. The decode
step of each size is compiled when the size first occurs.

A request's tokens are those that it gets alone: it attends its own part of the cache, and its k-th
token is drawn with the k-th of its own uniform numbers.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cmjax.models.moe.generation.batch import (
    Completion,
    RequestBatch,
    Sampler,
    Tally,
    check_prompt,
)
from cmjax.models.moe.generation.placed import PlacedModel, padded_length
from cmjax.models.moe.generation.programs import BatchShape
from cmjax.processes import on_host


@dataclasses.dataclass(frozen=True)
class Emitted:
    """What a step gave one request."""

    request: int
    """Its number, as `ContinuousBatch.put` gave it."""
    tokens: list[int]
    """New ones, at least one."""
    completion: Completion | None
    """All of its tokens, if these were the last."""


class Finished(NamedTuple):
    """A request that has all its tokens."""

    request: int
    completion: Completion


class _Place(NamedTuple):
    """Where a request runs."""

    rank: int
    place: int
    """On the rank."""


@dataclasses.dataclass
class _Running:
    """A request in its place, and what it has so far."""

    request: int
    prompt: list[int]
    tally: Tally

    def take(self, tokens: Sequence[int]) -> Emitted:
        """Take in what a step sampled."""
        new = self.tally.take(tokens)
        return Emitted(self.request, new, self.tally.completion() if self.tally.done else None)


class ContinuousBatch:
    """Requests go in with `put`, at any time; iterating gives those that finish, as they finish.

    Iterating ends when nobody runs or waits; it can be taken up again after another `put`. One
    thread iterates, or calls `step`; others may put meanwhile.
    """

    def __init__(
        self,
        model: PlacedModel,
        *,
        places: int,
        context: int | None = None,
        sampler: Sampler | None = None,
        end_tokens: Sequence[int] = (),
    ):
        """See `Generator.continuous`."""
        if places < 1:
            raise ValueError(f"continuous: places must be at least 1, got {places}")
        limit = model.config.context_limit
        self.context = limit if context is None else context
        if not 2 <= self.context <= limit:
            raise ValueError(
                f"continuous: context must be 2 to {limit} tokens, as many as the model is meant "
                f"for, got {context}"
            )
        self.steps = 0
        """Decode steps so far."""
        self.computed = 0
        """Places that these steps computed, those that nobody had included."""
        sampler = sampler or Sampler()
        self._ranks = ranks = model.mesh.ranks
        self._sizes = _halves(-(-places // ranks))  # places of a rank that a cache may hold
        self._model, self._end_tokens = model, frozenset(end_tokens)
        self._numbers = itertools.count()
        self._waiting: collections.deque[_Running] = collections.deque()
        self._running: dict[_Place, _Running] = {}
        self._room = padded_length(model.config, self.context)
        self._greedy = sampler.temperature == 0
        shape = (ranks, self._sizes[0])
        self._shape = self._shape_of(self._sizes[0])
        self._caches: Any = (model.decoding(self._shape).empty_cache(),)
        self._batch = RequestBatch(
            prompts=np.zeros((*shape, 1), np.int32),
            lengths=np.zeros(shape, np.int32),  # tokens in the cache
            uniform=np.zeros((ranks * shape[1], self.context + model.drafts + 1), np.float32),
            sampler=sampler,
            drafts=model.drafts,
            done=np.ones(ranks * shape[1], int),
        )
        self._tokens = np.zeros((*shape, 1 + model.drafts), np.int32)

    def put(self, prompt: Sequence[int], new_tokens: int) -> int:
        """Let a request wait for a place; it is to get up to `new_tokens` tokens.

        Returns: its number: 0, 1, 2 and so on.
        Raises: ValueError: an empty prompt, tokens outside the vocabulary, or more tokens than a
          place holds. The batch goes on without it.
        """
        check_prompt(self._model.config, prompt, new_tokens, self.context, "put", "the prompt")
        number = next(self._numbers)
        self._waiting.append(_Running(number, list(prompt), Tally(new_tokens, self._end_tokens)))
        return number

    @property
    def places(self) -> int:
        """Requests that can run at once."""
        return self._ranks * self._sizes[-1]

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[Finished]:
        while self._running or self._waiting:
            for emitted in self.step():
                if emitted.completion is not None:
                    yield Finished(emitted.request, emitted.completion)

    def step(self) -> list[Emitted]:
        """Give free places to who waits, and every request that has one its next tokens.

        Returns: what each got, of prefill and of the decode step; nothing where nobody waits.
        """
        emitted = []
        while self._waiting and len(self._running) < self.places:
            emitted += self._join()
        if self._running:
            counts = collections.Counter(place.rank for place in self._running)
            self._hold(max(counts.values()))
            emitted += self._decode()
        return emitted

    def _join(self) -> list[Emitted]:
        """Prefill one waiting request a rank, as far as there are free places."""
        ranks, each = self._batch.lengths.shape
        wanted = min(self.places, len(self._running) + len(self._waiting))
        if wanted > ranks * each:
            self._hold(-(-wanted // ranks))
            each = self._shape.requests
        places = np.full(ranks, -1, np.int32)
        joining: dict[int, _Running] = {}  # by rank
        for rank in range(ranks):
            free = (p for p in range(each) if _Place(rank, p) not in self._running)
            place = next(free, None)
            if place is None or not self._waiting:
                continue
            joining[rank], places[rank] = self._waiting.popleft(), place
        longest = max(len(r.prompt) for r in joining.values())
        width = _width(longest, self._room)
        prompts = np.zeros((ranks, 1, width), np.int32)
        lengths = np.ones((ranks, 1), np.int32)
        uniform = np.zeros((ranks, self._batch.uniform.shape[1]), np.float32)
        for rank, running in joining.items():
            size = len(running.prompt)
            prompts[rank, 0, :size], lengths[rank] = running.prompt, size
            uniform[rank] = self._batch.sampler.stream(running.request, uniform.shape[1])
        drafts, done = self._batch.drafts, np.ones(ranks, int)
        batch = RequestBatch(prompts, lengths, uniform, self._batch.sampler, drafts, done)
        sizes = self._model.sizes(requests=1, prompt=width, room=self._room, greedy=self._greedy)
        first, caches = self._model.prefill(batch, sizes)
        self._caches = self._model.joining(self._shape)(self._caches, caches, places)
        emitted = []
        for rank, running in joining.items():
            at = _Place(rank, int(places[rank]))
            found = first[rank, 0]
            self._tokens[at] = [*found, *[found[-1]] * drafts][: 1 + drafts]
            self._batch.lengths[at] = len(running.prompt)
            row = rank * each + at.place
            self._batch.uniform[row], self._batch.done[row] = uniform[rank], 1
            emitted.append(running.take(found[:1].tolist()))
            if emitted[-1].completion is None:
                self._running[at] = running
        return emitted

    def _decode(self) -> list[Emitted]:
        """A decode step of the places that the cache holds."""
        inputs = self._batch.decode_inputs(self._tokens, self._batch.lengths)
        program = self._model.decoding(self._shape)
        step = program.run(self._model.used_params, self._caches, inputs)
        self._caches, self.steps = step.caches, self.steps + 1
        self.computed += self._batch.requests
        found = on_host((step.tokens, step.lengths, step.emitted, step.sampled))
        self._tokens = np.array(found[0])
        count = found[2].reshape(-1)
        sampled = found[3].reshape(count.size, -1)
        self._batch.advance(count)
        emitted = []
        for place, running in list(self._running.items()):
            row = place.rank * self._shape.requests + place.place
            emitted.append(running.take(sampled[row, : count[row]].tolist()))
            if emitted[-1].completion is not None:
                del self._running[place]
        self._batch.lengths = _only_of(self._running, found[1])
        return emitted

    def _hold(self, needed: int) -> None:
        """Let the cache hold the fewest places a rank that are at least `needed`; those who run
        move to the first."""
        each = next(size for size in self._sizes if size >= needed)
        if each == self._shape.requests:
            return
        old, self._shape = self._shape, self._shape_of(each)
        moved: dict[_Place, _Running] = {}
        source = np.zeros((self._ranks, each), np.int32)  # the rest are places that nobody has
        for rank in range(self._ranks):
            here = sorted(place for place in self._running if place.rank == rank)
            source[rank, : len(here)] = [place.place for place in here]
            moved |= {_Place(rank, p): self._running[place] for p, place in enumerate(here)}
        self._caches = self._model.moving(old, self._shape)(self._caches, source)
        self._tokens = np.take_along_axis(self._tokens, source[..., None], axis=1)
        lengths = _only_of(moved, np.take_along_axis(self._batch.lengths, source, axis=1))
        rows = (source + old.requests * np.arange(self._ranks)[:, None]).reshape(-1)
        self._batch = dataclasses.replace(
            self._batch,
            prompts=np.zeros((*lengths.shape, 1), np.int32),
            lengths=lengths,
            uniform=self._batch.uniform[rows],
            done=self._batch.done[rows],
        )
        self._running = moved

    def _shape_of(self, each: int) -> BatchShape:
        return self._model.sizes(requests=each, prompt=1, room=self._room, greedy=self._greedy)


def _only_of(running: Iterable[_Place], lengths: np.ndarray) -> np.ndarray:
    """`lengths` of the places that somebody has; zero in the others."""
    kept = np.zeros_like(lengths)
    for place in running:
        kept[place] = lengths[place]
    return kept


def _halves(most: int) -> list[int]:
    """`most`, half of it and so on (rounded up) down to one, ascending."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes[::-1]


def _width(longest: int, room: int) -> int:
    """Tokens that prompts are padded to: a power of two, so that few lengths are compiled."""
    width = 16
    while width < longest:
        width *= 2
    return min(width, room)
