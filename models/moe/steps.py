"""One rank's prefill and decode steps, and their abstract arguments at any size.

    step = abstract_decode(deepseek_r1(), two_stream_decode(), table, mesh, requests=b, context=n)
    lifted = on_every_rank(step.fn, mesh, step.in_specs, step.out_specs, abstract=True)
    jaxpr = jax.make_jaxpr(lifted)(*step.args)         # nothing is allocated

The same `fn` runs: give it `shard_params(init_params(...), parallelism)` and real inputs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32

from cmjax.mesh import RANKED, RankMesh
from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layers.cache import ModelCache, empty_cache
from cmjax.models.moe.layers.mtp import draft
from cmjax.models.moe.layers.transformer import decode_attention, prefill_attention
from cmjax.models.moe.model import MoEModel, abstract_model, from_config, parameters
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sample import sample
from cmjax.models.moe.schedule import Schedule
from cmjax.models.moe.sharding import param_specs
from cmjax.models.moe.slots import SlotTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Per-request sampling, prepared on the host before the step."""

    uniform: Float32[Array, "requests *new"]  # in [0, 1), one per token the step may emit
    temperature: Float32[Array, "requests"] | None  # 0: greedy; None: all greedy, nothing is sorted
    top_p: Float32[Array, "requests"] | None
    top_k: Int32[Array, "requests"] | None = None  # None: no limit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeInputs:
    """State of a rank's requests. Microbatches are equal blocks of the leading axis."""

    tokens: Int32[Array, "requests new"]  # newest accepted token, then drafts
    lengths: Int32[Array, "requests"]  # tokens in the cache, not counting `tokens`
    # one per microbatch; of all requests of a tensor-parallel group
    caches: tuple[ModelCache, ...]
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOutput:
    """What a decode step found. `tokens`, `lengths` and `caches` are the next step's inputs."""

    sampled: Int32[Array, "requests new"]  # the first `emitted` of them are the request's output
    emitted: Int32[Array, "requests"]  # 1 + accepted drafts
    tokens: Int32[Array, "requests new"]
    lengths: Int32[Array, "requests"]
    caches: tuple[ModelCache, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillInputs:
    """A rank's prompts, padded on the right."""

    tokens: Int32[Array, "sequences prompt"]
    lengths: Int32[Array, "sequences"]  # real tokens of each prompt
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillOutput:
    """First generated token, scores it was drawn from, and caches as long as the padded prompt."""

    tokens: Int32[Array, "sequences new"]  # the first token, then with MTP a draft
    logits: Float32[Array, "sequences vocab"]
    caches: tuple[ModelCache, ...]


class RankStep(NamedTuple):
    """A per-rank step with abstract arguments, ready for `on_every_rank`."""

    fn: Callable  # fn(params, inputs)
    args: tuple  # ShapeDtypeStructs; RANKED ones have the leading axis of ranks
    in_specs: tuple
    out_specs: Any


def decode_step(model: MoEModel, inputs: DecodeInputs) -> DecodeOutput:
    """One decode step: run the newest token and the drafts, sample, accept, draft again.

    A draft is accepted if it equals what the model samples in its place and all drafts before it
    were; that keeps the output's distribution the model's own. Cache entries of rejected drafts
    are overwritten by the next step.
    """
    count = len(inputs.caches)
    new = inputs.tokens.shape[1]
    lengths = _split(inputs.lengths, count)
    hidden, caches = model.main.decode(_split(inputs.tokens, count), inputs.caches, lengths)
    logits = model.main.logits(jnp.concatenate(hidden))
    with jax.named_scope("sample"):
        how = inputs.sampling
        each = jax.tree.map(lambda x: x[:, None], (how.temperature, how.top_p, how.top_k))
        sampled = sample(logits, how.uniform, *each)
        agrees = (sampled[:, :-1] == inputs.tokens[:, 1:]).astype(jnp.int32)
        accepted = jnp.sum(jnp.cumprod(agrees, axis=1), axis=1)
        tokens = jnp.take_along_axis(sampled, accepted[:, None], axis=1)
    if model.mtp is not None and new > 1:
        with jax.named_scope("mtp"):
            drafts, caches = _draft_all(model, hidden, sampled, caches, lengths, accepted, new - 1)
        tokens = jnp.concatenate([tokens, drafts], axis=1)
    elif new > 1:
        raise ValueError(
            f"decode_step: {new - 1} draft(s) per request need an MTP module; build with mtp=True"
        )
    return DecodeOutput(sampled, accepted + 1, tokens, inputs.lengths + accepted + 1, tuple(caches))


def prefill_step(model: MoEModel, inputs: PrefillInputs, kv_cache: KVCache) -> PrefillOutput:
    """Run whole prompts: the first token of each and the caches to decode on."""
    count = model.main.parallelism.schedule.microbatches
    lengths, tokens = _split(inputs.lengths, count), _split(inputs.tokens, count)
    hidden, caches = model.main.prefill(tokens, kv_cache)
    last = inputs.lengths - 1
    logits = model.main.logits(_at(jnp.concatenate(hidden), last))
    with jax.named_scope("sample"):
        how = inputs.sampling
        first = sample(logits, how.uniform, how.temperature, how.top_p, how.top_k)
    out = first[:, None]
    if model.mtp is not None:
        with jax.named_scope("mtp"):
            following = [
                _shifted(t, n, f)
                for t, n, f in zip(tokens, lengths, _split(first, count), strict=True)
            ]
            hidden, mtp = model.mtp(
                model.main, hidden, tuple(following), (None,) * count, prefill_attention(kv_cache)
            )
            caches = _with_mtp(caches, mtp)
            drafted = draft(model.main, _at(jnp.concatenate(hidden), last))
        out = jnp.concatenate([out, drafted[:, None]], axis=1)
    return PrefillOutput(out, logits, tuple(caches))


def init_params(
    config: MoEConfig, precision: Arithmetic | str, *, mtp: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Random parameters of the one-rank model."""
    return parameters(from_config(config, precision=precision, mtp=mtp, seed=seed))


def abstract_params(
    config: MoEConfig, parallelism: Parallelism, precision: Arithmetic | str, *, mtp: bool = False
) -> dict[str, Any]:
    """Shapes of one rank's parameters."""
    return abstract_model(config, parallelism, precision, mtp=mtp)[1]


def decode_fn(
    config: MoEConfig, parallelism: Parallelism, precision: Arithmetic | str, *, mtp: bool = False
) -> Callable[[dict[str, Any], DecodeInputs], DecodeOutput]:
    """`decode_step` as a function of a rank's parameters and inputs."""
    graph, _ = abstract_model(config, parallelism, precision, mtp=mtp)
    return lambda params, inputs: decode_step(nnx.merge(graph, params), inputs)


def prefill_fn(
    config: MoEConfig,
    parallelism: Parallelism,
    precision: Arithmetic | str,
    kv_cache: KVCache,
    *,
    mtp: bool = False,
) -> Callable[[dict[str, Any], PrefillInputs], PrefillOutput]:
    """`prefill_step` as a function of a rank's parameters and inputs."""
    graph, _ = abstract_model(config, parallelism, precision, mtp=mtp)
    return lambda params, inputs: prefill_step(nnx.merge(graph, params), inputs, kv_cache)


def abstract_decode(
    config: MoEConfig,
    schedule: Schedule,
    table: SlotTable,
    mesh: RankMesh,
    requests: Any,
    context: Any,
    *,
    capacity: Any = None,
    precision: Arithmetic | str = "int8",
    kv_cache: KVCache = "bfloat16",
    mtp: int = 1,
    permutes: bool = False,
) -> RankStep:
    """A decode step of every rank of `mesh`, with arguments that are shapes.

    Args:
      config: the model.
      schedule: microbatches, streams and order.
      table: slots of the experts; its ranks are the mesh's.
      mesh: the ranks, and which of them form tensor-parallel groups.
      requests: requests per microbatch per rank; an int or a symbolic dimension.
      context: cache length in tokens; likewise.
      capacity: dispatch rows per (source rank, slot); likewise; `None` is tokens per microbatch.
      precision: of the matrices.
      kv_cache: format of the latent cache.
      mtp: drafts per request and step; 0 for plain decoding.
      permutes: see `Parallelism`.
    """
    parallelism = _parallelism(schedule, table, mesh, capacity, permutes=permutes)
    total, count = schedule.microbatches * requests, schedule.microbatches

    def cache():
        size = requests, context, kv_cache
        return empty_cache(config, *size, mtp=bool(mtp), tensor=mesh.tensor)

    def inputs():
        return DecodeInputs(
            tokens=jnp.zeros((total, 1 + mtp), jnp.int32),
            lengths=jnp.zeros((total,), jnp.int32),
            caches=(cache(),) * count,
            sampling=_no_sampling(total, (1 + mtp,)),
        )

    fn = decode_fn(config, parallelism, precision, mtp=bool(mtp))
    return _step(
        fn, abstract_params(config, parallelism, precision, mtp=bool(mtp)), inputs, parallelism
    )


def abstract_prefill(
    config: MoEConfig,
    schedule: Schedule,
    table: SlotTable,
    mesh: RankMesh,
    sequences: Any,
    prompt: Any,
    *,
    capacity: Any = None,
    precision: Arithmetic | str = "int8",
    kv_cache: KVCache = "bfloat16",
    mtp: int = 1,
    sequence_parallel: bool = True,
    permutes: bool = False,
) -> RankStep:
    """A prefill step of every rank of `mesh`, with arguments that are shapes.

    Args:
      sequences: prompts per microbatch per rank; an int or a symbolic dimension.
      prompt: padded prompt length in tokens; likewise.
      mtp: 0 to leave the draft module out.
      sequence_parallel: see `Parallelism`.
      The rest as in `abstract_decode`.
    """
    parallelism = _parallelism(
        schedule, table, mesh, capacity, permutes=permutes, sequence_parallel=sequence_parallel
    )
    total = schedule.microbatches * sequences

    def inputs():
        return PrefillInputs(
            tokens=jnp.zeros((total, prompt), jnp.int32),
            lengths=jnp.zeros((total,), jnp.int32),
            sampling=_no_sampling(total, ()),
        )

    fn = prefill_fn(config, parallelism, precision, kv_cache, mtp=bool(mtp))
    return _step(
        fn, abstract_params(config, parallelism, precision, mtp=bool(mtp)), inputs, parallelism
    )


def _draft_all(model, hidden, sampled, caches, lengths, accepted, drafts):
    """Run the MTP module over the step's tokens, then on its own drafts."""
    count = len(caches)
    where = _split(accepted, count)
    mtp = tuple(cache.mtp for cache in caches)
    parallelism = model.main.parallelism
    attend = decode_attention(lengths, parallelism)
    hidden, mtp = model.mtp(model.main, hidden, _split(sampled, count), mtp, attend)
    hidden = tuple(_at(h, a) for h, a in zip(hidden, where, strict=True))
    found = [draft(model.main, jnp.concatenate(hidden))]
    for step in range(1, drafts):
        ends = tuple(n + a + step for n, a in zip(lengths, where, strict=True))
        following = _split(found[-1][:, None], count)
        attend = decode_attention(ends, parallelism)
        last = tuple(h[:, None] for h in hidden)
        hidden, mtp = model.mtp(model.main, last, following, mtp, attend)
        hidden = tuple(h[:, 0] for h in hidden)
        found.append(draft(model.main, jnp.concatenate(hidden)))
    return jnp.stack(found, axis=1), _with_mtp(caches, mtp)


def _with_mtp(caches, mtp):
    return tuple(dataclasses.replace(c, mtp=m) for c, m in zip(caches, mtp, strict=True))


def _shifted(tokens, lengths, first):
    """What follows each prompt token: the next one, and after the last the generated one."""
    following = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    here = jnp.arange(tokens.shape[1], dtype=jnp.int32) == lengths[:, None] - 1
    return jnp.where(here, first[:, None], following)


def _at(x, index):
    """`x[i, index[i]]`."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def _split(x, count):
    """Equal blocks of the leading axis, one per microbatch."""
    if count == 1:
        return (x,)
    if isinstance(x.shape[0], int) and x.shape[0] % count:
        raise ValueError(
            f"requests must be a multiple of the schedule's {count} microbatches, got {x.shape[0]}"
        )
    size = x.shape[0] // count
    return tuple(x[i * size : (i + 1) * size] for i in range(count))


def _parallelism(schedule, table, mesh, capacity, *, permutes, sequence_parallel=False):
    if table.ranks != mesh.ranks:
        raise ValueError(
            f"the slot table is for {table.ranks} ranks, the mesh has {mesh.ranks} "
            f"({' x '.join(map(str, mesh.shape))}); build it with ep_table(..., {mesh.ranks})"
        )
    return Parallelism(
        table=table,
        axes=mesh.axes,
        capacity=capacity,
        schedule=schedule,
        tensor=mesh.tensor,
        tensor_axes=mesh.tensor_axes,
        permutes=permutes,
        sequence_parallel=sequence_parallel,
    )


def _no_sampling(total, extra):
    each = jnp.zeros((total,), jnp.float32)
    return Sampling(jnp.zeros((total, *extra), jnp.float32), each, each)


def _step(fn, params, inputs, parallelism):
    specs = param_specs(params, parallelism)

    def ranked(x):
        return jax.ShapeDtypeStruct((parallelism.ranks, *x.shape), x.dtype)

    params = jax.tree.map(lambda spec, x: ranked(x) if spec is RANKED else x, specs, params)
    inputs = jax.tree.map(ranked, jax.eval_shape(inputs))
    return RankStep(fn, (params, inputs), (specs, RANKED), RANKED)
