"""Batched generation on a mesh of ranks: prefill, then decode steps with the cache.

Requests are spread over the ranks (data parallelism), experts too (expert parallelism). A request's
k-th token is drawn with the k-th of its own uniform numbers, whatever step and batch it falls in.
So speculative decoding (drafts by multi-token prediction, accepted where they equal what the model
draws in their place) gives the very tokens of plain decoding, sampled ones too, and keeps the
model's distribution; a draft is accepted with the probability the model gives it, which no rule for
deterministic drafts can better (Leviathan et al. 2023, section 3.3).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cmjax.mesh import RANKED, REPLICATED, RankMesh, Spec, on_every_rank
from models.moe.arithmetic import Arithmetic, KVCache
from models.moe.batch import Batch, Completion, Sampler, Tally, check_prompts
from models.moe.cache import extend_cache
from models.moe.config import MoEConfig
from models.moe.deepseek import abstract_params, decode_fn, prefill_fn
from models.moe.layout import Layout, param_specs

_PROMPT_STEP = 16  # prompts are padded to a multiple, so that fewer lengths are compiled
OnStep = Callable[[int, int], None]


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
      params: its parameters on the mesh, as `load_params` or `place_params` gives them.
      layout: of the parameters; `layout.axes` are the mesh's.
      mesh: the ranks.
      precision: of the parameters.
      kv_cache: format of the cache.
      drafts: tokens the MTP module drafts per step; 0 for plain decoding.
    """

    config: MoEConfig
    params: dict[str, Any]
    layout: Layout
    mesh: RankMesh
    precision: Arithmetic | str = "float32"
    kv_cache: KVCache = "float32"
    drafts: int = 0

    def __post_init__(self):
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
        on_step: OnStep | None = None,
    ) -> Generated:
        """Continue each prompt by up to `new_tokens` tokens.

        Args:
          prompts: tokens of each prompt, of any lengths.
          sampler: by default greedy.
          context: tokens the cache holds per request; by default what the longest request needs.
          end_tokens: a request stops after one of these.
          on_step: called after prefill and every step with tokens generated and asked for.
        Raises:
          ValueError: no prompt, an empty one, tokens outside the vocabulary, or more tokens than
            the cache holds or the model is meant for; names the prompt and the sizes.
        """
        sampler = sampler or Sampler()
        context = check_prompts(self.config, prompts, new_tokens, context)
        width = -(-max(map(len, prompts)) // _PROMPT_STEP) * _PROMPT_STEP
        width = min(width, self.config.max_position)
        batch = Batch.of(prompts, width, self.mesh.ranks, new_tokens, self.drafts, sampler)
        compiling = time.perf_counter()
        # a padded prompt may be longer than the context; drafts are written beyond it and dropped
        room = max(context, width)
        prefill, decode = _compiled(
            self.config,
            self.layout,
            self.mesh,
            self.precision,
            self.kv_cache,
            self.drafts,
            batch.lengths.shape[1],
            width,
            room,
        )
        started = time.perf_counter()
        out = jax.block_until_ready(prefill(self._used, batch.prefill_inputs()))
        prefill_s = time.perf_counter() - started
        tally = Tally(len(prompts), new_tokens, end_tokens)
        tally.add(_flat(out.tokens)[:, :1], np.ones(batch.requests, int))
        tokens, caches = np.asarray(out.tokens), out.caches
        tokens = np.concatenate([tokens, *[tokens[..., -1:]] * self.drafts], -1)
        tokens, lengths = tokens[..., : 1 + self.drafts], batch.lengths
        steps, step_started = 0, time.perf_counter()
        while not tally.finished:
            if on_step is not None:
                on_step(tally.count, tally.wanted)
            inputs = batch.decode_inputs(tokens, lengths)
            step = jax.block_until_ready(decode(self._used, caches, inputs))
            tokens, lengths = np.asarray(step.tokens), np.asarray(step.lengths)
            caches = step.caches
            emitted = _flat(step.emitted)
            tally.add(_flat(step.sampled), emitted, drafts=self.drafts)
            batch.advance(emitted)
            steps += 1
        if on_step is not None:
            on_step(tally.count, tally.wanted)
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

    @property
    def _used(self) -> dict[str, Any]:
        """The parameters, without the draft module's where nothing is drafted."""
        return self.params if self.drafts else {"main": self.params["main"]}


def place_params(params: dict[str, Any], layout: Layout, mesh: RankMesh) -> dict[str, Any]:
    """Parameters that `shard_params` gave, on the mesh's devices."""
    where = _shardings(mesh)
    specs = param_specs(params, layout)
    # from NumPy: JAX moves an array of one device to many slowly
    return jax.tree.map(lambda spec, x: jax.device_put(np.asarray(x), where[spec]), specs, params)


def _shardings(mesh: RankMesh) -> dict[Spec, NamedSharding]:
    devices = mesh.concrete()
    return {
        RANKED: NamedSharding(devices, PartitionSpec("node")),
        REPLICATED: NamedSharding(devices, PartitionSpec()),
    }


@functools.lru_cache(maxsize=16)
def _compiled(
    config: MoEConfig,
    layout: Layout,
    mesh: RankMesh,
    precision: Arithmetic | str,
    kv_cache: KVCache,
    drafts: int,
    each: int,
    width: int,
    room: int,
) -> tuple[Callable, Callable]:
    """Prefill of `each` prompts of `width` per rank, and the decode step with `room` in the cache;
    kept for further batches of these sizes."""
    mtp = drafts > 0
    prefill = prefill_fn(config, layout, precision, kv_cache, mtp=mtp)
    decode = decode_fn(config, layout, precision, mtp=mtp)

    def first(params, inputs):
        out = prefill(params, inputs)
        return dataclasses.replace(out, caches=extend_cache(out.caches, room))

    def step(params, caches, inputs):
        return decode(params, dataclasses.replace(inputs, caches=caches))

    where = _shardings(mesh)
    shapes = abstract_params(config, layout, precision, mtp=mtp)
    specs = param_specs(shapes, layout)

    def on_mesh(spec, leaf):
        shape = (layout.ranks, *leaf.shape) if spec is RANKED else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where[spec])

    params = jax.tree.map(on_mesh, specs, shapes)
    like = Batch.of([[0]] * (mesh.ranks * each), width, mesh.ranks, 1, drafts, Sampler())
    inputs = like.prefill_inputs()
    lifted = jax.jit(on_every_rank(first, mesh, (specs, RANKED), RANKED))
    caches = jax.eval_shape(lifted, params, inputs).caches
    starting = lifted.lower(params, inputs).compile()
    caches = jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
        caches,
        starting.output_shardings.caches,
    )
    inputs = like.decode_inputs(np.zeros((mesh.ranks, each, 1 + drafts), np.int32), like.lengths)
    lifted = on_every_rank(step, mesh, (specs, RANKED, RANKED), RANKED)
    # the caches are donated: a step writes into them instead of copying them
    return starting, jax.jit(lifted, donate_argnums=1).lower(params, caches, inputs).compile()


def _flat(x) -> np.ndarray:
    """`[ranks, requests, ...]` to `[ranks * requests, ...]`, on the host."""
    x = np.asarray(x)
    return x.reshape(-1, *x.shape[2:])
