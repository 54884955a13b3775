"""The compiled programs of a generation on a mesh: prefill and decode, for a batch of given sizes.

Prefill runs whole prompts, each rank its own (data parallelism) or, sequence-parallel, with every
rank attending a share of the heads of all ranks' prompts; or it runs chunks of them on the cache.
Parameters are the same for all: those of data-parallel decode.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from cmjax.mesh import RANKED, REPLICATED, RankMesh, Spec, on_every_rank
from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.batch import RequestBatch, Sampler
from cmjax.models.moe.generation.chunked import chunk_fn
from cmjax.models.moe.layered import join_cache, join_layers, split_cache, split_shapes
from cmjax.models.moe.layers.cache import empty_cache, extend_cache
from cmjax.models.moe.layers.transformer import unrolled_layers
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import own_heads, param_specs
from cmjax.models.moe.steps import (
    DecodeInputs,
    DecodeOutput,
    abstract_params,
    decode_fn,
    prefill_fn,
)
from cmjax.processes import on_mesh


@dataclasses.dataclass(frozen=True)
class ModelOnMesh:
    """What programs are compiled for, besides a batch.

    Fields:
      config: the model. parallelism: of its parameters. mesh: the ranks.
      precision: of the parameters. kv_cache: format of the cache.
    """

    config: MoEConfig
    parallelism: Parallelism
    mesh: RankMesh
    precision: Arithmetic | str
    kv_cache: KVCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """What the shapes of a generation's programs follow from.

    Fields:
      requests: per rank. prompt: tokens that prompts are padded to. room: tokens a request's cache
        holds. drafts: per request and decode step.
      chunk: tokens of a prompt per chunk; `None` for whole prompts.
      sequence_parallel: of prefill.
      greedy: no token is drawn, so nothing is sorted.
      steps: most decode steps of one call; more than one only without drafts.
      layered: parameters are those of `split_layers`, caches likewise.
    """

    requests: int
    prompt: int
    room: int
    drafts: int = 0
    chunk: int | None = None
    sequence_parallel: bool = False
    greedy: bool = True
    steps: int = 1
    layered: bool = False


@dataclasses.dataclass(frozen=True)
class RankProgram:
    """One rank's program (`fn`, of arguments by `specs`) and its executable on all ranks."""

    fn: Callable
    specs: tuple
    compiled: Any

    def __call__(self, *args):
        """Run and wait: steps that pile up can deadlock (see `cmjax.mesh`)."""
        return jax.block_until_ready(self.compiled(*args))


@dataclasses.dataclass(frozen=True)
class CacheProgram:
    """A program of a batch, and the cache that it reads, without entries.

    `run(params, inputs)` of prefill gives a `PrefillOutput`; with chunks, `run(params, cache,
    inputs)` gives found tokens and the cache. `run(params, caches, inputs)` of decoding gives a
    `DecodeOutput`; of several steps it takes how many besides.
    """

    run: RankProgram
    empty_cache: Callable[[], Any]


def place_params(
    params: dict[str, Any], parallelism: Parallelism, mesh: RankMesh
) -> dict[str, Any]:
    """Parameters that `shard_params` gave, on the mesh's devices."""
    specs = param_specs(params, parallelism)
    return jax.tree.map(lambda spec, x: on_mesh(x, mesh, spec), specs, params)


def placed_shapes(
    shapes: dict[str, Any], parallelism: Parallelism, mesh: RankMesh, *, split: bool
) -> dict[str, Any]:
    """Shapes and shardings of the parameters on a mesh, of those of one rank (`abstract_params`).

    Args: split: layers have arrays of their own, as `split_layers` gives them.
    """
    specs = param_specs(shapes, parallelism)
    shapes = split_shapes(shapes) if split else shapes
    return jax.tree.map(lambda spec, sub: _placed(spec, sub, mesh), specs, shapes)


@functools.lru_cache(maxsize=32)
def compile_prefill(model: ModelOnMesh, sizes: BatchShape) -> CacheProgram:
    """The prefill of a batch; what was compiled for one of these sizes before is given again.

    Raises:
      ValueError: sequence-parallel prefill in chunks, of grouped-query attention, or of heads that
        do not divide over the ranks.
    """
    config, precision, mtp = model.config, model.precision, sizes.drafts > 0
    parallelism = check_prefill(config, model.parallelism, sizes.chunk, sizes.sequence_parallel)
    batch = _Batch(model, sizes)
    if sizes.chunk is not None:
        found = np.zeros((model.mesh.ranks, sizes.requests, 1 + mtp), np.int32)
        run = batch.compiled(
            chunk_fn(config, parallelism, precision, mtp=mtp),
            batch.params,
            batch.cache,
            batch.like.chunk_inputs(0, sizes.chunk, found),
            donate=1,
        )
        return CacheProgram(run, batch.empty)
    whole = prefill_fn(config, parallelism, precision, model.kv_cache, mtp=mtp)

    def first(params, inputs):
        own = own_heads(params, parallelism) if sizes.sequence_parallel else params
        out = whole(own, inputs)
        return dataclasses.replace(out, caches=extend_cache(out.caches, sizes.room))

    run = batch.compiled(first, batch.params, batch.like.prefill_inputs())
    return CacheProgram(run, batch.empty)


def compile_decode(model: ModelOnMesh, sizes: BatchShape) -> CacheProgram:
    """The decode step of a batch, or `sizes.steps` of them; batches that differ in their prefill
    share it."""
    sizes = dataclasses.replace(sizes, prompt=1, chunk=None, sequence_parallel=False)
    return _compile_decode(model, sizes)


@functools.lru_cache(maxsize=16)
def _compile_decode(model: ModelOnMesh, sizes: BatchShape) -> CacheProgram:
    batch, mtp = _Batch(model, sizes), sizes.drafts > 0
    decode_one = decode_fn(model.config, model.parallelism, model.precision, mtp=mtp)

    def step(params, caches, inputs):
        return decode_one(params, dataclasses.replace(inputs, caches=caches))

    tokens = np.zeros((model.mesh.ranks, sizes.requests, 1 + sizes.drafts), np.int32)
    inputs = batch.like.decode_inputs(tokens, batch.like.lengths, sizes.steps)
    # the caches are donated: a step writes into them instead of copying them
    args = batch.params, (batch.cache,), inputs
    if sizes.steps == 1:
        return CacheProgram(batch.compiled(step, *args, donate=1), batch.empty)
    some = np.int32(1)
    run = batch.compiled(step, *args, some, donate=1, lift=_repeated, specs=(REPLICATED,))
    return CacheProgram(run, batch.empty)


def _repeated(step: Callable) -> Callable:
    """`step` so many times, each with the next of the numbers in `inputs.sampling.uniform`: the
    host waits once for all of them."""

    def run(params, caches, inputs, steps):
        uniform = inputs.sampling.uniform

        def one(i, state):
            tokens, lengths, caches, sampled = state
            number = lax.dynamic_slice_in_dim(uniform, i, 1, axis=1)
            sampling = dataclasses.replace(inputs.sampling, uniform=number)
            out = step(params, caches, DecodeInputs(tokens, lengths, (), sampling))
            sampled = lax.dynamic_update_slice_in_dim(sampled, out.sampled, i, axis=1)
            return out.tokens, out.lengths, out.caches, sampled

        state = inputs.tokens, inputs.lengths, caches, jnp.zeros(uniform.shape, jnp.int32)
        tokens, lengths, caches, sampled = lax.fori_loop(0, steps, one, state)
        emitted = jnp.broadcast_to(steps, lengths.shape)
        return DecodeOutput(sampled, emitted, tokens, lengths, caches)

    return run


@functools.lru_cache(maxsize=16)
def compile_join(model: ModelOnMesh, sizes: BatchShape) -> Callable[[Any, Any, np.ndarray], Any]:
    """`join(caches, new, places)`: `caches` of a batch of `sizes`, which are donated, with those of
    one new request a rank in the rank's place `places[rank]`; -1 where a rank has none."""
    batch, new = _Batch(model, sizes), _Batch(model, dataclasses.replace(sizes, requests=1))
    axis = 0 if sizes.layered else 1  # of requests

    def put(old, entry, place):
        at = jnp.maximum(place, 0)
        here = lax.dynamic_slice_in_dim(old, at, 1, axis)
        entry = jnp.where(place >= 0, entry, here)
        return lax.dynamic_update_slice_in_dim(old, entry, at, axis)

    def join(caches, new, place):
        return jax.tree.map(functools.partial(put, place=place), caches, new)

    lifted = on_every_rank(join, model.mesh, (RANKED, RANKED, RANKED), RANKED)
    places = np.zeros(model.mesh.ranks, np.int32)
    lowered = jax.jit(lifted, donate_argnums=0).lower((batch.cache,), (new.cache,), places)
    return lowered.compile()


@functools.lru_cache(maxsize=64)
def compile_move(
    model: ModelOnMesh,
    old: BatchShape,
    new: BatchShape,
) -> Callable[[Any, np.ndarray], Any]:
    """`move(caches, source)`: of `caches` of a batch of `old`, those of a batch of `new`, which
    differs in its requests: of rank `r`, place `p` holds what place `source[r, p]` held."""
    batch = _Batch(model, old)
    axis = 0 if old.layered else 1  # of requests

    def move(caches, source):
        return jax.tree.map(lambda x: jnp.take(x, source, axis, mode="clip"), caches)

    lifted = on_every_rank(move, model.mesh, (RANKED, RANKED), RANKED)
    source = np.zeros((model.mesh.ranks, new.requests), np.int32)
    return jax.jit(lifted).lower((batch.cache,), source).compile()


class _Batch:
    """Shapes of what the programs of a batch take, and how one is compiled."""

    def __init__(self, model: ModelOnMesh, sizes: BatchShape):
        self.mesh, self.sizes = model.mesh, sizes
        mtp, ranks = sizes.drafts > 0, self.mesh.ranks
        whole = abstract_params(model.config, model.parallelism, model.precision, mtp=mtp)
        self.specs = param_specs(whole, model.parallelism)
        self.params = placed_shapes(whole, model.parallelism, self.mesh, split=sizes.layered)

        def empty_of_rank():
            room = sizes.requests, sizes.room
            cache = empty_cache(model.config, *room, model.kv_cache, mtp=mtp)
            return split_cache(cache) if sizes.layered else cache

        self.cache = _placed(RANKED, jax.eval_shape(empty_of_rank), self.mesh)
        sampler = Sampler(temperature=0.0 if sizes.greedy else 1.0)
        prompts = [[0]] * (ranks * sizes.requests)
        self.like = RequestBatch.of(prompts, sizes.prompt, ranks, 1, sizes.drafts, sampler)

    def compiled(
        self,
        whole: Callable,
        *args: Any,
        donate: Any = (),
        lift: Callable[[Callable], Callable] = lambda fn: fn,
        specs: tuple[Spec, ...] = (),
    ) -> RankProgram:
        """`whole`, a program of one rank's parameters and more, for all ranks; or `lift` of it. The
        last arguments have `specs`."""
        fn = lift(_of_layers(whole) if self.sizes.layered else whole)
        every = (self.specs, *(RANKED,) * (len(args) - 1 - len(specs)), *specs)
        lifted = on_every_rank(fn, self.mesh, every, RANKED)
        executable = jax.jit(lifted, donate_argnums=donate).lower(*args).compile()
        return RankProgram(fn, every, executable)

    def empty(self) -> Any:
        """A cache of zeros."""
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), self.cache
        )


def _of_layers(fn: Callable) -> Callable:
    """A program of parameters and caches that `cmjax.models.moe.layered` splits."""

    def run(params, *args):
        *caches, inputs = args
        with unrolled_layers():
            out = fn(join_layers(params), *map(_joined, caches), inputs)
        if isinstance(out, tuple):  # of a chunk: what was found, and the cache
            return out[0], split_cache(out[1])
        return dataclasses.replace(out, caches=split_cache(out.caches))

    return run


def _joined(caches: Any) -> Any:
    """A cache, or a tuple of them, of arrays of layers."""
    return tuple(map(join_cache, caches)) if isinstance(caches, tuple) else join_cache(caches)


def check_prefill(
    config: MoEConfig, parallelism: Parallelism, chunk: int | None, sequence_parallel: bool
) -> Parallelism:
    """The parallelism of prefill.

    Raises: ValueError: see `compile_prefill`.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill_chunk must be at least 1 token, got {chunk}")
    if not sequence_parallel:
        return parallelism
    if chunk is not None:
        raise ValueError(
            f"prefill in chunks of {chunk} tokens attends the cache of its own rank: choose either "
            "prefill_chunk or sequence_parallel"
        )
    prefill_parallelism = dataclasses.replace(parallelism, sequence_parallel=True)
    prefill_parallelism.heads(config)
    return prefill_parallelism


def _placed(spec: Spec, tree: Any, mesh: RankMesh) -> Any:
    """Shapes on a mesh, of those of one rank."""
    lead = (mesh.ranks,) if spec is RANKED else ()
    where = PartitionSpec("node") if spec is RANKED else PartitionSpec()
    sharding = NamedSharding(mesh.concrete(), where)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=sharding), tree
    )
