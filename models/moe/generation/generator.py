"""Batched generation on a mesh of ranks: prefill, then decode steps with the cache.

Requests are spread over the ranks (data parallelism), experts too (expert parallelism). A request's
k-th token is drawn with the k-th of its own uniform numbers, whatever step and batch it falls in.
So speculative decoding (drafts by multi-token prediction, accepted where they equal what the model
draws in their place) gives the very tokens of plain decoding, sampled ones too, and keeps the
model's distribution; a draft is accepted with the probability the model gives it, which no rule for
deterministic drafts can better (Leviathan et al. 2023, section 3.3).
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cmjax.console import Progress
from cmjax.mesh import RankMesh
from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.batch import (
    Completion,
    CompletionTally,
    RequestBatch,
    Sampler,
    check_prompts,
)
from cmjax.models.moe.generation.layered import are_split
from cmjax.models.moe.generation.programs import (
    BatchShape,
    Programs,
    check_prefill,
    compile_programs,
)
from cmjax.models.moe.parallelism import Parallelism

_PROMPT_STEP = 16  # prompts are padded to a multiple, so that fewer lengths are compiled


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
class Generator:
    """A model on its mesh, ready to generate.

    Attributes:
      config: the model.
      params: its parameters on the mesh, as `load_params` or `place_params` gives them, or these
        as `split_layers` takes them apart, which is faster on CPU devices.
      parallelism: of the parameters; `parallelism.axes` are the mesh's.
      mesh: the ranks.
      precision: of the parameters.
      kv_cache: format of the cache.
      drafts: tokens the MTP module drafts per step; 0 for plain decoding.
      prefill_chunk: tokens of each prompt per prefill step; `None` for whole prompts.
      sequence_parallel: in prefill, each rank attends a share of the heads of all ranks' prompts.
    Raises: ValueError: drafts without an MTP module, or a prefill that cannot be.
    """

    config: MoEConfig
    params: dict[str, Any]
    parallelism: Parallelism
    mesh: RankMesh
    precision: Arithmetic | str = "float32"
    kv_cache: KVCache = "float32"
    drafts: int = 0
    prefill_chunk: int | None = None
    sequence_parallel: bool = False

    def __post_init__(self):
        check_prefill(self.config, self.parallelism, self.prefill_chunk, self.sequence_parallel)
        if self.drafts < 0:
            raise ValueError(f"Generator: drafts must be at least 0, got {self.drafts}")
        if self.drafts and "mtp" not in self.params:
            raise ValueError(
                f"Generator: {self.drafts} draft(s) per step need the weights of a multi-token-"
                "prediction module, which this model was loaded without; use drafts=0"
            )

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
        chunk = self.prefill_chunk and min(self.prefill_chunk, width)
        sizes = BatchShape(
            requests=batch.lengths.shape[1],
            prompt=chunk or width,
            # a padded prompt may be longer than the context; what is written beyond it is dropped
            room=context if chunk else max(context, width),
            drafts=self.drafts,
            chunk=chunk,
            sequence_parallel=self.sequence_parallel,
            greedy=sampler.temperature == 0,
            layered=are_split(self.params),
        )
        programs = compile_programs(
            self.config, self.parallelism, self.mesh, self.precision, self.kv_cache, sizes
        )
        started = time.perf_counter()
        tokens, caches = self._prefill(programs, batch, chunk, longest)
        prefill_s = time.perf_counter() - started
        tally = CompletionTally(len(prompts), new_tokens, end_tokens)
        tally.add(_flat(tokens)[:, :1], np.ones(batch.requests, int))
        tokens = np.concatenate([tokens, *[tokens[..., -1:]] * self.drafts], -1)
        tokens, lengths = tokens[..., : 1 + self.drafts], batch.lengths
        steps, step_started = 0, time.perf_counter()
        while not tally.finished:
            if progress is not None:
                progress(tally.count, tally.wanted, "generating")
            inputs = batch.decode_inputs(tokens, lengths)
            step = programs.decode(self._used, caches, inputs)
            tokens, lengths = np.asarray(step.tokens), np.asarray(step.lengths)
            caches = step.caches
            emitted = _flat(step.emitted)
            tally.add(_flat(step.sampled), emitted, drafts=self.drafts)
            batch.advance(emitted)
            steps += 1
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

    def _prefill(
        self, programs: Programs, batch: RequestBatch, chunk: int | None, longest: int
    ) -> tuple[np.ndarray, tuple[Any, ...]]:
        """The first token of each request (and a draft), `[ranks, requests, new]`; the caches."""
        if chunk is None:
            out = programs.prefill(self._used, batch.prefill_inputs())
            return np.asarray(out.tokens), out.caches
        cache = programs.empty_cache()
        found = np.zeros((*batch.lengths.shape, 1 + (self.drafts > 0)), np.int32)
        for start in range(0, longest, chunk):
            inputs = batch.chunk_inputs(start, chunk, found)
            found, cache = programs.prefill(self._used, cache, inputs)
            found = np.asarray(found)
        return found, (cache,)

    @property
    def _used(self) -> dict[str, Any]:
        """The parameters, without the draft module's where nothing is drafted."""
        return self.params if self.drafts else {"main": self.params["main"]}


def padded_length(config: MoEConfig, prompt_tokens: int) -> int:
    """Tokens that whole prompts are padded to, if the longest has `prompt_tokens`."""
    return min(-(-prompt_tokens // _PROMPT_STEP) * _PROMPT_STEP, config.context_limit)


def _flat(x) -> np.ndarray:
    """`[ranks, requests, ...]` to `[ranks * requests, ...]`, on the host."""
    x = np.asarray(x)
    return x.reshape(-1, *x.shape[2:])
