"""Batched generation on a mesh of ranks: prefill, then decode steps with the cache.

Requests are spread over the ranks (data parallelism), experts too (expert parallelism). A request's
k-th token is drawn with the k-th of its own uniform numbers, whatever step and batch it falls in.
So speculative decoding (drafts by multi-token prediction, accepted where they equal what the model
draws in their place) gives the very tokens of plain decoding, sampled ones too, and keeps the
model's distribution; a draft is accepted with the probability the model gives it, which no rule for
deterministic drafts can better (Leviathan et al. 2023, section 3.3).

Of several processes each holds the parameters and caches of its own ranks, and all follow every
request: whatever is on the host is the same on all of them.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from cmjax.console import Progress
from cmjax.models.moe.generation.batch import (
    Completion,
    CompletionTally,
    RequestBatch,
    Sampler,
    check_prompts,
)
from cmjax.models.moe.generation.continuous import ContinuousBatch
from cmjax.models.moe.generation.placed import PlacedModel, padded_length
from cmjax.processes import on_host

_TOGETHER = 8  # decode steps of one call, which costs the host some tenths of a millisecond


@dataclasses.dataclass(frozen=True)
class Generated:
    """Completions in the order of the prompts, and what they took."""

    completions: list[Completion]
    prompt_tokens: int
    compile_s: float
    prefill_s: float
    decode_s: float
    steps: int
    drafted: int
    """Drafts that unfinished requests proposed."""
    accepted: int
    """Of these, how many became output."""

    @property
    def decoded_tokens(self) -> int:
        """Tokens that decode steps gave: all but the first of each request, which prefill gives."""
        return sum(len(c.tokens) - 1 for c in self.completions)

    @property
    def acceptance(self) -> float | None:
        """Share of drafts that were accepted; `None` without drafts."""
        return self.accepted / self.drafted if self.drafted else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator(PlacedModel):
    """A model on its mesh, ready to generate: `generate` for a batch of prompts, `continuous` for
    requests that come and go. Attributes and errors are those of `PlacedModel`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        sampler: Sampler | None = None,
        context: int | None = None,
        end_tokens: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Generated:
        """Continue each prompt by up to `new_tokens` tokens.

        Args:
          prompts: tokens of each prompt, of any lengths.
          sampler: by default greedy.
          context: tokens the cache holds per request; by default what the longest request needs.
          end_tokens: a request stops after one of these.
          progress: called after prefill and every step with the tokens generated, those asked
            for, and what is being done.
        Raises:
          ValueError: no prompt, an empty one, tokens outside the vocabulary, or more tokens than
            the cache holds or the model is meant for; names the prompt and the sizes.
        """
        sampler = sampler or Sampler()
        context = check_prompts(self.config, prompts, new_tokens, context)
        longest = max(map(len, prompts))
        width = padded_length(self.config, longest)
        batch = RequestBatch.of(prompts, width, self.mesh.ranks, new_tokens, self.drafts, sampler)
        compiling = time.perf_counter()
        sizes = self.sizes(
            requests=batch.lengths.shape[1],
            prompt=width,
            room=context,
            greedy=sampler.temperature == 0,
        )
        self.prefilling(sizes)
        most = 1 if self.drafts else _TOGETHER
        decoding = self.decoding(dataclasses.replace(sizes, steps=most))
        started = time.perf_counter()
        tokens, caches = self.prefill(batch, sizes)
        prefill_s = time.perf_counter() - started
        tally = CompletionTally(len(prompts), new_tokens, end_tokens)
        tally.add(_flat(tokens)[:, :1], np.ones(batch.requests, int))
        tokens = np.concatenate([tokens, *[tokens[..., -1:]] * self.drafts], -1)
        tokens, lengths = tokens[..., : 1 + self.drafts], batch.lengths
        steps, step_started = 0, time.perf_counter()
        while not tally.finished:
            if progress is not None:
                progress(tally.count, tally.wanted, "generating")
            inputs = batch.decode_inputs(tokens, lengths, most)
            some = min(most, tally.most_left)
            counts = () if most == 1 else (np.int32(some),)
            step = decoding.run(self.used_params, caches, inputs, *counts)
            caches = step.caches
            found = on_host((step.tokens, step.lengths, step.emitted, step.sampled))
            tokens, lengths, emitted, sampled = found
            emitted = _flat(emitted)
            tally.add(_flat(sampled), emitted, drafts=self.drafts)
            batch.advance(emitted)
            steps += some
        if progress is not None:
            progress(tally.count, tally.wanted, "generating")
        return Generated(
            tally.completions(),
            sum(map(len, prompts)),
            started - compiling,
            prefill_s,
            time.perf_counter() - step_started,
            steps,
            tally.drafted,
            tally.accepted,
        )

    def continuous(
        self,
        *,
        places: int,
        context: int | None = None,
        sampler: Sampler | None = None,
        end_tokens: Sequence[int] = (),
    ) -> ContinuousBatch:
        """A batch that requests join and leave between steps.

            >>> from cmjax.models.moe import open_generator, tiny
            >>> batch = open_generator(tiny()).continuous(places=2, context=32)
            >>> for prompt, new_tokens in ([1, 2, 3], 9), ([4], 2), ([5, 6], 3):
            ...     number = batch.put(prompt, new_tokens)
            >>> [(request, len(found.tokens)) for request, found in batch]  # the third takes over
            [(1, 2), (2, 3), (0, 9)]

        Args:
          places: requests that run at once, rounded up to a multiple of the ranks.
          context: tokens that the cache of each holds, prompt and new ones; by default as many as
            the model is meant for.
          sampler: by default greedy. The numbers of request `n` (as `put` numbers them) are those
            of prompt `n` of `generate`.
          end_tokens: a request leaves after one of these.
        Raises: ValueError: no place, or a context that the model is not meant for.
        """
        return ContinuousBatch(
            self, places=places, context=context, sampler=sampler, end_tokens=end_tokens
        )


def _flat(x: np.ndarray) -> np.ndarray:
    """`[ranks, requests, ...]` to `[ranks * requests, ...]`."""
    return x.reshape(-1, *x.shape[2:])
