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
from jax.sharding import NamedSharding, PartitionSpec

from cmjax.mesh import RANKED, REPLICATED, RankMesh, Spec, on_every_rank
from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.batch import RequestBatch, Sampler
from cmjax.models.moe.generation.chunked import chunk_fn
from cmjax.models.moe.generation.layered import (
    join_cache,
    join_layers,
    split_cache,
    split_shapes,
)
from cmjax.models.moe.layers.cache import empty_cache, extend_cache
from cmjax.models.moe.layers.transformer import unrolled_layers
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import own_heads, param_specs
from cmjax.models.moe.steps import abstract_params, decode_fn, prefill_fn


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """What the shapes of a generation's programs follow from.

    Fields:
      requests: per rank. prompt: tokens that prompts are padded to. room: tokens a request's cache
        holds. drafts: per request and decode step.
      chunk: tokens of a prompt per chunk; `None` for whole prompts.
      sequence_parallel: of prefill.
      greedy: no token is drawn, so nothing is sorted.
      layered: parameters are those of `split_layers`, caches likewise.
    """

    requests: int
    prompt: int
    room: int
    drafts: int = 0
    chunk: int | None = None
    sequence_parallel: bool = False
    greedy: bool = True
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
class Programs:
    """Prefill and decode of one batch.

    `prefill(params, inputs)` gives a `PrefillOutput`; with chunks, `prefill(params, cache, inputs)`
    gives found tokens and the cache. `decode(params, caches, inputs)` gives a `DecodeOutput`.
    """

    prefill: RankProgram
    decode: RankProgram
    empty_cache: Callable[[], Any]


def place_params(
    params: dict[str, Any], parallelism: Parallelism, mesh: RankMesh
) -> dict[str, Any]:
    """Parameters that `shard_params` gave, on the mesh's devices."""
    where = _shardings(mesh)
    specs = param_specs(params, parallelism)
    # from NumPy: JAX moves an array of one device to many slowly
    return jax.tree.map(lambda spec, x: jax.device_put(np.asarray(x), where[spec]), specs, params)


@functools.lru_cache(maxsize=16)
def compile_programs(
    config: MoEConfig,
    parallelism: Parallelism,
    mesh: RankMesh,
    precision: Arithmetic | str,
    kv_cache: KVCache,
    sizes: BatchShape,
) -> Programs:
    """Compile, or give what was compiled for a batch of these sizes before.

    Raises:
      ValueError: sequence-parallel prefill in chunks, of grouped-query attention, or of heads that
        do not divide over the ranks.
    """
    prefill_parallelism = check_prefill(config, parallelism, sizes.chunk, sizes.sequence_parallel)
    mtp = sizes.drafts > 0
    where = _shardings(mesh)
    whole_shapes = abstract_params(config, parallelism, precision, mtp=mtp)
    specs = param_specs(whole_shapes, parallelism)
    shapes = split_shapes(whole_shapes) if sizes.layered else whole_shapes

    def on_mesh(spec, leaf):
        shape = (parallelism.ranks, *leaf.shape) if spec is RANKED else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where[spec])

    params = jax.tree.map(
        lambda spec, sub: jax.tree.map(functools.partial(on_mesh, spec), sub), specs, shapes
    )
    ranks, each = mesh.ranks, sizes.requests
    sampler = Sampler(temperature=0.0 if sizes.greedy else 1.0)
    like = RequestBatch.of([[0]] * (ranks * each), sizes.prompt, ranks, 1, sizes.drafts, sampler)

    def compiled(whole, *args, donate=()):
        fn = _of_layers(whole) if sizes.layered else whole
        rest = (RANKED,) * (len(args) - 1)
        lifted = on_every_rank(fn, mesh, (specs, *rest), RANKED)
        executable = jax.jit(lifted, donate_argnums=donate).lower(*args).compile()
        return RankProgram(fn, (specs, *rest), executable)

    def empty_of_rank():
        cache = empty_cache(config, each, sizes.room, kv_cache, mtp=mtp)
        return split_cache(cache) if sizes.layered else cache

    cache = jax.tree.map(functools.partial(on_mesh, RANKED), jax.eval_shape(empty_of_rank))
    if sizes.chunk is not None:
        found = np.zeros((ranks, each, 1 + mtp), np.int32)
        prefill = compiled(
            chunk_fn(config, parallelism, precision, mtp=mtp),
            params,
            cache,
            like.chunk_inputs(0, sizes.chunk, found),
            donate=1,
        )
    else:
        whole = prefill_fn(config, prefill_parallelism, precision, kv_cache, mtp=mtp)

        def first(params, inputs):
            own = own_heads(params, prefill_parallelism) if sizes.sequence_parallel else params
            out = whole(own, inputs)
            return dataclasses.replace(out, caches=extend_cache(out.caches, sizes.room))

        prefill = compiled(first, params, like.prefill_inputs())
    decode_one = decode_fn(config, parallelism, precision, mtp=mtp)

    def step(params, caches, inputs):
        return decode_one(params, dataclasses.replace(inputs, caches=caches))

    inputs = like.decode_inputs(np.zeros((ranks, each, 1 + sizes.drafts), np.int32), like.lengths)
    # the caches are donated: a step writes into them instead of copying them
    decode = compiled(step, params, (cache,), inputs, donate=1)

    def empty():
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), cache
        )

    return Programs(prefill, decode, empty)


def _of_layers(fn: Callable) -> Callable:
    """A program of parameters and caches that `cmjax.models.moe.generation.layered` splits."""

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

    Raises: ValueError: see `compile_programs`.
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


def _shardings(mesh: RankMesh) -> dict[Spec, NamedSharding]:
    devices = mesh.concrete()
    return {
        RANKED: NamedSharding(devices, PartitionSpec("node")),
        REPLICATED: NamedSharding(devices, PartitionSpec()),
    }
