"""A model on a mesh of ranks, and its prefill: what every way of generating starts from."""

import dataclasses
from typing import Any

import numpy as np

from cmjax.mesh import RankMesh
from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.batch import RequestBatch
from cmjax.models.moe.generation.programs import (
    BatchShape,
    CacheProgram,
    ModelOnMesh,
    check_prefill,
    compile_decode,
    compile_join,
    compile_move,
    compile_prefill,
)
from cmjax.models.moe.layered import are_split
from cmjax.models.moe.parallelism import Parallelism
from cmjax.processes import on_host

_PROMPT_STEP = 16  # prompts are padded to a multiple, so that fewer lengths are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedModel:
    """A model on its mesh.

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

    @property
    def used_params(self) -> dict[str, Any]:
        """The parameters, without the draft module's where nothing is drafted."""
        return self.params if self.drafts else {"main": self.params["main"]}

    def sizes(self, *, requests: int, prompt: int, room: int, greedy: bool) -> BatchShape:
        """Of a batch: requests per rank, tokens that their prompts are padded to and that the cache
        of each is to hold, and whether nothing is drawn."""
        chunk = self.prefill_chunk and min(self.prefill_chunk, prompt)
        return BatchShape(
            requests=requests,
            prompt=chunk or prompt,
            # a padded prompt may be longer than the context; what is written beyond it is dropped
            room=room if chunk else max(room, prompt),
            drafts=self.drafts,
            chunk=chunk,
            sequence_parallel=self.sequence_parallel,
            greedy=greedy,
            layered=are_split(self.params),
        )

    def decoding(self, sizes: BatchShape) -> CacheProgram:
        """The compiled decode step of such a batch."""
        return compile_decode(self._on_mesh, sizes)

    def joining(self, sizes: BatchShape) -> Any:
        """The compiled `compile_join` of such a batch."""
        return compile_join(self._on_mesh, sizes)

    def moving(self, old: BatchShape, new: BatchShape) -> Any:
        """The compiled `compile_move` from such a batch to another."""
        return compile_move(self._on_mesh, old, new)

    def prefilling(self, sizes: BatchShape) -> CacheProgram:
        """The compiled prefill of such a batch."""
        return compile_prefill(self._on_mesh, sizes)

    def prefill(self, batch: RequestBatch, sizes: BatchShape) -> tuple[np.ndarray, tuple[Any, ...]]:
        """The first token of each request (and a draft), `[ranks, requests, new]`; the caches."""
        program, chunk = self.prefilling(sizes), sizes.chunk
        if chunk is None:
            out = program.run(self.used_params, batch.prefill_inputs())
            return on_host(out.tokens), out.caches
        cache = program.empty_cache()
        found = np.zeros((*batch.lengths.shape, 1 + (self.drafts > 0)), np.int32)
        for start in range(0, int(batch.lengths.max()), chunk):
            inputs = batch.chunk_inputs(start, chunk, found)
            found, cache = program.run(self.used_params, cache, inputs)
            found = on_host(found)
        return found, (cache,)

    @property
    def _on_mesh(self) -> ModelOnMesh:
        return ModelOnMesh(self.config, self.parallelism, self.mesh, self.precision, self.kv_cache)


def padded_length(config: MoEConfig, prompt_tokens: int) -> int:
    """Tokens that whole prompts are padded to, if the longest has `prompt_tokens`."""
    return min(-(-prompt_tokens // _PROMPT_STEP) * _PROMPT_STEP, config.context_limit)
