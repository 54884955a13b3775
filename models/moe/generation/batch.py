"""The requests of a batch on the host: their prompts, random numbers and what they have so far."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from cmjax.inputs import check_seed
from cmjax.models.moe.checkpoint.generation_config import GenerationDefaults
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.chunked import ChunkInputs
from cmjax.models.moe.steps import DecodeInputs, PrefillInputs, Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How tokens are drawn from the model's scores."""

    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach this."""
    top_k: int = 0
    """Of these, first, only this many likeliest; 0: all."""
    seed: int = 0
    """Of the uniform numbers; each request has its own stream."""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature must be a finite number, got {self.temperature}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must lie in 0..1, got {self.top_p}")
        if self.top_p == 0:
            raise ValueError("top_p must be more than 0, got 0; temperature 0 is greedy")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be at least 0 and below 2**31, got {self.top_k}")
        check_seed("seed", self.seed)

    @classmethod
    def of(
        cls,
        defaults: GenerationDefaults,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
    ) -> "Sampler":
        """What is given, and what a checkpoint says where `None` is.

        >>> Sampler.of(GenerationDefaults(do_sample=True, temperature=0.6, top_p=0.9), top_p=0.5)
        Sampler(temperature=0.6, top_p=0.5, top_k=0, seed=0)
        """
        cold = defaults.temperature if defaults.do_sample else 0.0
        return cls(
            temperature=cold if temperature is None else temperature,
            top_p=defaults.top_p if top_p is None else top_p,
            top_k=defaults.top_k if top_k is None else top_k,
            seed=seed,
        )

    def stream(self, request: int, count: int) -> np.ndarray:
        """`[count]` float32 in [0, 1) of one request; the first do not depend on how many."""
        return np.random.default_rng((self.seed, request)).random(count, np.float32)

    def uniform(self, requests: int, count: int) -> np.ndarray:
        """`[requests, count]` float32 in [0, 1); a request's do not depend on the others."""
        return np.stack([self.stream(request, count) for request in range(requests)])


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    tokens: list[int]
    reason: Literal["end token", "length"]


def check_prompts(
    config: MoEConfig,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    context: int | None = None,
) -> int:
    """The tokens a request's cache is to hold, after checking that every request fits.

    Raises: ValueError: see `Generator.generate`.
    """
    if not prompts:
        raise ValueError("generate: no prompt given")
    limit = config.context_limit if context is None else context
    if limit > config.context_limit:
        raise ValueError(
            f"generate: a context of {limit} tokens is more than the {config.context_limit} the "
            "model is meant for (max_position, or as far as YaRN stretches it)"
        )
    for number, prompt in enumerate(prompts, 1):
        check_prompt(config, prompt, new_tokens, None, "generate", f"prompt {number}")
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    hint = "" if context is None else ", or enlarge the context"
    name = f"prompt {longest + 1}"
    check_prompt(config, prompts[longest], new_tokens, limit, "generate", name, hint)
    return len(prompts[longest]) + new_tokens if context is None else context


def check_prompt(
    config: MoEConfig,
    prompt: Sequence[int],
    new_tokens: int,
    room: int | None,
    what: str,
    name: str,
    hint: str = "",
) -> None:
    """Check one request: tokens that there are, and with `room` as many as a cache holds.

    Raises: ValueError: names the caller (`what`) and the prompt (`name`).
    """
    if new_tokens < 1:
        raise ValueError(f"{what}: new_tokens must be at least 1, got {new_tokens}")
    if not len(prompt):
        raise ValueError(f"{what}: {name} is empty")
    wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
    if wrong:
        raise ValueError(
            f"{what}: {name} holds token {wrong[0]}; the model's are 0..{config.vocab_size - 1}"
        )
    if room is not None and len(prompt) + new_tokens > room:
        raise ValueError(
            f"{what}: {name} has {len(prompt)} tokens and is to get {new_tokens} more, the cache "
            f"holds {room} per request; shorten one of them{hint}"
        )


@dataclasses.dataclass
class RequestBatch:
    """The requests of all ranks as arrays with a leading axis of ranks; those that fill the last
    ranks up are one token long and nobody reads them."""

    prompts: np.ndarray  # [ranks, requests, prompt] int32
    lengths: np.ndarray  # [ranks, requests] int32
    uniform: np.ndarray  # [ranks * requests, tokens]
    sampler: Sampler
    drafts: int
    done: np.ndarray  # [ranks * requests] tokens generated

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        width: int,
        ranks: int,
        new_tokens: int,
        drafts: int,
        sampler: Sampler,
    ) -> "RequestBatch":
        """Prompts padded on the right to `width`, in order over the ranks; each request may draw
        `new_tokens`."""
        each = -(-len(prompts) // ranks)
        tokens = np.zeros((ranks * each, width), np.int32)
        lengths = np.ones(ranks * each, np.int32)
        for request, prompt in enumerate(prompts):
            tokens[request, : len(prompt)] = prompt
            lengths[request] = len(prompt)
        uniform = sampler.uniform(ranks * each, new_tokens + drafts + 1)
        shape = (ranks, each)
        done = np.ones(ranks * each, int)
        return cls(
            tokens.reshape(*shape, width), lengths.reshape(shape), uniform, sampler, drafts, done
        )

    @property
    def requests(self) -> int:
        """Of all ranks, those that only fill up included."""
        return self.lengths.size

    def prefill_inputs(self) -> PrefillInputs:
        """With the number that draws each request's first token."""
        uniform = self.uniform[:, 0].reshape(self.lengths.shape)
        return PrefillInputs(self.prompts, self.lengths, self._sampling(uniform))  # type: ignore

    def chunk_inputs(self, start: int, chunk: int, found: np.ndarray) -> ChunkInputs:
        """Tokens `start` to before `start + chunk` of the prompts, and what earlier chunks found
        (`[ranks, requests, 1 or 2]`)."""
        whole = self.prefill_inputs()
        short = max(0, start + chunk + 1 - self.prompts.shape[-1])
        padded = np.pad(self.prompts, [(0, 0), (0, 0), (0, short)])
        tokens, following = (padded[..., at : at + chunk] for at in (start, start + 1))
        starts = np.full_like(self.lengths, start)
        arrays: tuple = (tokens, following, starts, self.lengths, found)
        return ChunkInputs(*arrays, whole.sampling)  # type: ignore

    def decode_inputs(
        self, tokens: np.ndarray, lengths: np.ndarray, steps: int = 1
    ) -> DecodeInputs:
        """With the numbers that draw each request's next tokens, of so many steps; the caches are
        the caller's."""
        last = self.uniform.shape[1] - 1
        # a finished request runs on until all are; its numbers no longer matter
        slots = np.minimum(self.done[:, None] + np.arange(steps + self.drafts), last)
        uniform = np.take_along_axis(self.uniform, slots, axis=1)
        shape = (*self.lengths.shape, steps + self.drafts)
        sampling = self._sampling(uniform.reshape(shape))
        return DecodeInputs(tokens, lengths, (), sampling)  # type: ignore

    def advance(self, emitted: np.ndarray) -> None:
        """A step gave this many tokens, per request."""
        self.done += emitted

    def _sampling(self, uniform) -> Sampling:
        how = self.sampler
        if how.temperature == 0:
            return Sampling(uniform, None, None)  # type: ignore
        full = np.ones(self.lengths.shape, np.float32)
        # colder than this, scores divided by the temperature leave float32
        temperature = max(how.temperature, 1e-5)
        limit = np.full(self.lengths.shape, how.top_k or 2**31 - 1, np.int32)
        return Sampling(uniform, temperature * full, how.top_p * full, limit)  # type: ignore


@dataclasses.dataclass
class Tally:
    """What one request has so far."""

    new_tokens: int  # most that it is to get
    end_tokens: frozenset[int]
    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False

    @property
    def done(self) -> bool:
        """Whether it has all its tokens, or ended."""
        return self.ended or len(self.tokens) >= self.new_tokens

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Add tokens up to its last one; returns those that were added."""
        before = len(self.tokens)
        for token in tokens:
            if self.done:
                break
            self.tokens.append(token)
            self.ended = token in self.end_tokens
        return self.tokens[before:]

    def completion(self) -> Completion:
        """What it got."""
        return Completion(self.tokens, "end token" if self.ended else "length")


class CompletionTally:
    """What each request of a batch has so far."""

    def __init__(self, requests: int, new_tokens: int, end_tokens: Sequence[int]):
        ends = frozenset(end_tokens)
        self.each = [Tally(new_tokens, ends) for _ in range(requests)]
        self.drafted = self.accepted = 0

    def add(self, sampled: np.ndarray, emitted: np.ndarray, drafts: int = 0) -> None:
        """Take in a step: `sampled [requests, new]`, of which `emitted` are a request's, and how
        many were drafted for each."""
        for request, tally in enumerate(self.each):
            if tally.done:
                continue
            new = tally.take(sampled[request, : emitted[request]].tolist())
            self.drafted += drafts
            self.accepted += len(new) - 1 if drafts else 0

    @property
    def finished(self) -> bool:
        """Whether every request has all its tokens, or ended."""
        return all(tally.done for tally in self.each)

    @property
    def most_left(self) -> int:
        """Tokens that a request may still get, at most."""
        return max(t.new_tokens - len(t.tokens) for t in self.each if not t.done)

    @property
    def count(self) -> int:
        """Tokens so far."""
        return sum(len(tally.tokens) for tally in self.each)

    @property
    def wanted(self) -> int:
        """Tokens asked for."""
        return sum(tally.new_tokens for tally in self.each)

    def completions(self) -> list[Completion]:
        """What every request got."""
        return [tally.completion() for tally in self.each]
