"""From a trace and a service to what the event loop is told."""

import dataclasses

import numpy as np

from cmjax.deploy.requests import Gain
from cmjax.hardware import Supernode
from cmjax.serving.engine import COLOCATED, DECODE, FIXED, PREFILL
from cmjax.serving.engine.inputs import (
    ADMISSIONS,
    ROUTERS,
    CacheInputs,
    EngineInputs,
    Inputs,
    WorkerInputs,
)
from cmjax.serving.engine.table import Lookup
from cmjax.serving.hashing import nodes_of_blocks
from cmjax.serving.service import ColocatedPool, DecodePool, PrefillPool, Service
from cmjax.serving.step_times import StepTimes
from cmjax.serving.traces import Trace

BINS = 240
"""Bins of the pictures over the time of arrivals."""
_MANY = 1 << 40
_ROLES = {"prefill": PREFILL, "decode": DECODE, "colocated": COLOCATED}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """How a trace is replayed.

    Fields:
      slo_ttft_s, slo_tpot_s: what a good request keeps; `None` is no limit.
      clients: 0 replays the recorded times; else so many clients each send the next request
        `think_s` after their last one has ended.
      seed: of the accepted drafts.
      record: busy intervals of instances to keep, for a picture of them.
    """

    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    clients: int = 0
    think_s: float = 0.0
    seed: int = 0
    record: int = 0


def assemble(
    trace: Trace, service: Service, machine: Supernode, times: StepTimes, replay: Replay
) -> EngineInputs:
    """What the event loop is told.

    Raises: ValueError: an instance that cannot hold the longest request.
    """
    _check_fits(trace, service, times)
    pools = list(service.pools)
    decode = service.decode or service.colocated
    assert decode is not None
    name = "decode" if service.decode else "colocated"
    limit = decode.batch * decode.npus
    if times.kv_tokens[name]:
        mean = float(trace.prompt.mean() + trace.output.mean() / 2)
        limit = max(1, min(limit, int(times.kv_tokens[name] / mean)))
    losses = sorted(service.losses, key=lambda loss: loss.at_s)
    first = _first_worker(service)
    longest = trace.duration_s if not replay.clients else 0.0
    return EngineInputs(
        requests=_requests(trace, times.gain, replay.seed),
        workers=_workers(service, times),
        cache=_cache(trace, service, machine, times),
        tables=tuple(times.tables[name] for name in pools),
        router=ROUTERS.index(service.router),
        admission=ADMISSIONS.index(service.admission),
        slo_ttft_s=float("inf") if replay.slo_ttft_s is None else replay.slo_ttft_s,
        decode_limit=limit,
        prefill_tokens_per_s=_prefill_rate(trace, service, times),
        handover_s=times.kv_token_bytes / float(machine.fabric.rdma.bandwidth_bytes_per_s),
        handover_latency_s=float(machine.fabric.rdma.latency_s),
        links=times.ranks.get("prefill", 1),
        clients=replay.clients,
        think_s=replay.think_s,
        loss_s=np.array([loss.at_s for loss in losses], float),
        loss_worker=np.array([first[x.pool] + x.instance for x in losses], np.int32),
        back_s=np.array([loss.back_s for loss in losses], float),
        bin_s=max(longest / BINS, 1e-3) if longest else 10.0,
        record=replay.record,
    )


def decode_steps(output: np.ndarray, gain: Gain, seed: int) -> np.ndarray:
    """Decode steps of each request until its last token, the first one being the prefill's.

    With m tokens a step on average, and their variance v, the steps to n tokens are nearly normal,
    of mean n / m and variance n v / m^3 (renewal theory). They lie between n over the most tokens
    of a step, and n.
    """
    tokens = output - 1
    sigma = np.sqrt(tokens * max(gain.variance, 0.0) / gain.mean**3)
    drawn = tokens / gain.mean + sigma * np.random.default_rng(seed).standard_normal(len(output))
    return np.clip(np.rint(drawn), -(-tokens // gain.most), tokens).astype(np.int64)


def _requests(trace: Trace, gain: Gain, seed: int) -> Inputs:
    steps = decode_steps(trace.output, gain, seed)
    growth = ((trace.output - 1) << FIXED) // np.maximum(steps, 1)
    return Inputs(
        arrival_s=np.ascontiguousarray(trace.arrival_s, float),
        prompt=np.ascontiguousarray(trace.prompt, np.int64),
        output=np.ascontiguousarray(trace.output, np.int64),
        steps=steps,
        growth=growth.astype(np.int64),
        block_start=np.ascontiguousarray(trace.block_start, np.int64),
        block=np.ascontiguousarray(trace.block, np.int32),
    )


def _workers(service: Service, times: StepTimes) -> WorkerInputs:
    rows = []
    for table, (name, pool) in enumerate(service.pools.items()):
        row = {
            "role": _ROLES[name], "table": table, "ranks": 1, "max_requests": _MANY,
            "max_tokens": _MANY, "chunk": 0, "capacity": times.kv_tokens[name] << FIXED,
            "waste": ((times.page - 1) << FIXED) // 2, "keeps": 0, "start_s": pool.start_s,
            "pause_every_s": 0.0, "pause_s": 0.0,
        }  # fmt: skip
        if isinstance(pool, PrefillPool):
            row |= {"max_tokens": pool.step_tokens, "chunk": pool.chunk, "waste": 0}
        if isinstance(pool, ColocatedPool):
            row |= {"max_tokens": pool.step_tokens, "keeps": int(pool.prefix_caching)}
        if isinstance(pool, DecodePool):
            row |= {"pause_every_s": pool.eplb_every_s, "pause_s": pool.eplb_pause_s}
        if isinstance(pool, DecodePool | ColocatedPool):
            row |= {"max_requests": pool.batch * pool.npus, "ranks": times.ranks[name]}
        rows += [row] * pool.instances
    types = {"role": np.int32, "table": np.int32, "ranks": np.int32}
    types |= dict.fromkeys(("start_s", "pause_every_s", "pause_s"), float)
    return WorkerInputs(
        **{name: np.array([r[name] for r in rows], types.get(name, np.int64)) for name in rows[0]}
    )


def _first_worker(service: Service) -> dict[str, int]:
    first, found = 0, {}
    for name, pool in service.pools.items():
        found[name] = first
        first += pool.instances
    return found


def _cache(trace: Trace, service: Service, machine: Supernode, times: StepTimes) -> CacheInputs:
    given = service.cache
    none = CacheInputs(
        node=np.zeros(0, np.int32), memory=np.zeros(1, np.int64), disk=np.zeros(1, np.int64)
    )
    if given is None or not trace.has_blocks or given.blocks == 0:
        return none
    pool = service.prefill or service.colocated
    assert pool is not None
    own = given.scope == "instance"
    nodes = -(-service.npus // machine.npus_per_node)
    total = given.blocks
    if total is None:
        block_bytes = times.kv_token_bytes * trace.block_tokens
        total = int(given.gb_per_node * 1e9 * nodes / block_bytes)
    shelves = 1 if own else nodes
    stores = pool.instances if own else 1
    tier = machine.fabric.vpc if given.plane == "vpc" else machine.fabric.supernode
    dies = pool.npus * machine.dies_per_npu
    return CacheInputs(
        stores=stores,
        blocks=trace.blocks,
        block_tokens=trace.block_tokens,
        node=nodes_of_blocks(trace.blocks, shelves),
        memory=_split(total // stores, shelves),
        disk=_split(given.ssd_blocks // stores, shelves),
        memory_s=times.kv_token_bytes / (float(tier.bandwidth_bytes_per_s) * dies),
        disk_s=times.kv_token_bytes / (given.ssd_gb_per_s * 1e9),
        latency_s=float(tier.latency_s),
    )


def _split(total: int, parts: int) -> np.ndarray:
    """A number in nearly equal parts."""
    each, more = divmod(total, parts)
    return np.array([each + (i < more) for i in range(parts)], np.int64)


def _prefill_rate(trace: Trace, service: Service, times: StepTimes) -> float:
    """Prompt tokens per second of one instance that is always full."""
    name = "prefill" if service.prefill else "colocated"
    pool = service.prefill or service.colocated
    assert pool is not None
    prompt = trace.prompt.astype(float)
    length = float((prompt**2).sum() / prompt.sum())
    tokens = pool.step_tokens
    return tokens / Lookup(times.tables[name]).step_s(tokens, length, 0, 0.0, tokens, 1)


def _check_fits(trace: Trace, service: Service, times: StepTimes) -> None:
    need = trace.prompt + trace.output + times.page
    at = int(need.argmax())
    for name in service.pools:
        holds = times.kv_tokens[name]
        if holds and holds < need[at]:
            raise ValueError(
                f"{service.name}: an instance of {name} holds the keys and values of {holds:,} "
                f"tokens, and request {at + 1} of {trace.source} has {need[at]:,}; use more NPUs "
                "per instance, or a smaller kv_cache format"
            )
