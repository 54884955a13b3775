"""One mesh of `studies.mesh`, in a process of its own: run the model, count its bytes, compare.

    python -m studies.mesh_worker --mesh 48x8 --plan PLAN.json --json OUT.json

The programs are those of a generation, in float32: every rank has one request; prefill is
SP -> TP -> SP with the heads spread over all ranks, decode is data- and expert-parallel.
"""

import dataclasses
import functools
import json
import resource
import time
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmjax.files import replace_text
from cmjax.interrupt import leave
from cmjax.mesh import RANKED, RankMesh, on_every_rank, prepare_devices
from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.generation.batch import RequestBatch, Sampler
from cmjax.models.moe.generation.programs import (
    BatchShape,
    ModelOnMesh,
    compile_decode,
    compile_prefill,
    place_params,
)
from cmjax.models.moe.model import MoEModel, abstract_model
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.schedule import Schedule
from cmjax.models.moe.sharding import shard_params
from cmjax.models.moe.slots import SlotTable, ep_table, plan_tables
from cmjax.models.moe.steps import abstract_decode, abstract_prefill, init_params
from cmjax.options import run_program
from cmjax.placement import read_plan
from cmjax.program import trace
from cmjax.verify.compiled import device_bytes
from cmjax.verify.traffic import count_traffic, pair_bytes, priced_bytes, tier_bytes

_REFERENCE = 64  # sequences that the unsharded model runs at a time


def small_model() -> MoEConfig:
    """A DeepSeek-V3 of 256 experts and a shared one, its heads divisible over 768 ranks."""
    return MoEConfig(
        vocab_size=256,
        hidden_size=64,
        layers=3,
        dense_layers=(0,),
        heads=768,
        attention=LatentAttention(
            q_lora_rank=16, kv_lora_rank=16, qk_nope_dim=4, qk_rope_dim=4, v_dim=4
        ),
        ffn_size=64,
        expert_ffn_size=32,
        routed_experts=256,
        shared_experts=1,
        experts_per_token=8,
        expert_groups=8,
        groups_per_token=4,
        routed_scale=2.5,
        max_position=64,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worker:
    """Options of one run."""

    mesh: str
    """Nodes x NPUs x dies."""
    json: Path
    """Where the result goes."""
    plan: Path | None = None
    """Where experts live, by `cmjax place`; without it, each expert once."""
    prompt: int = 2
    """Tokens of a request's prompt."""
    steps: int = 10
    """Decode steps to time."""
    count: bool = True
    """Count bytes and compare logits, after what is timed."""


def run(options: Worker) -> dict[str, Any]:
    """Start, compile and step; then count and compare. Times are seconds of wall clock and CPU."""
    clock = _Clock()
    mesh, config = RankMesh.parse(options.mesh), small_model()
    prepare_devices(mesh.nodes)
    parallelism, tables = _parallelism(config, mesh, options.plan)
    params = init_params(config, "float32")
    placed = place_params(shard_params(params, parallelism, tables), parallelism, mesh)
    prompts = np.random.default_rng(0).integers(
        0, config.vocab_size, (mesh.ranks, options.prompt + 1)
    )
    batch = RequestBatch.of(prompts[:, :-1].tolist(), options.prompt, mesh.ranks, 1, 0, Sampler())
    result: dict[str, Any] = {"mesh": options.mesh, "ranks": mesh.ranks, "start": clock.lap()}

    sizes = BatchShape(
        requests=1,
        prompt=options.prompt,
        room=options.prompt + 1,
        sequence_parallel=mesh.ranks > 1,
    )
    model = ModelOnMesh(config, parallelism, mesh, "float32", "float32")
    prefill, decode = compile_prefill(model, sizes).run, compile_decode(model, sizes).run
    result["compile"] = clock.lap()

    first = prefill(placed, batch.prefill_inputs())
    result["prefill"] = clock.lap()
    # The same step every time: it writes the same token at the same place of the cache.
    inputs = batch.decode_inputs(prompts[:, None, -1:].astype(np.int32), batch.lengths)
    caches, laps = first.caches, []
    for _ in range(options.steps):
        caches = decode(placed, caches, inputs).caches
        laps.append(clock.lap())
    result["steps"] = {key: [lap[key] for lap in laps] for key in clock.total()}
    result["total"] = clock.total()
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not options.count:
        return result

    reference = _reference(config, params, prompts)
    del params
    result["phases"] = {}
    for phase, program, args in (
        ("prefill", prefill, (placed, batch.prefill_inputs())),
        ("decode", decode, (placed, caches, inputs)),
    ):
        fn = program.fn if phase == "prefill" else _decode_logits(config, parallelism)
        counting = on_every_rank(count_traffic(fn, mesh), mesh, program.specs, RANKED)
        out, found = jax.block_until_ready(jax.jit(counting)(*args))
        logits = np.asarray(out.logits if phase == "prefill" else out)
        want = reference[:, -2 if phase == "prefill" else -1]
        tokens = options.prompt if phase == "prefill" else 1
        result["phases"][phase] = {
            "logits_difference": float(np.abs(logits.reshape(want.shape) - want).max()),
            "logits_largest": float(np.abs(want).max()),
            **_bytes(found, mesh),
            **_priced(config, parallelism, mesh, phase, options.prompt, tokens),
            "device_bytes": device_bytes(program.compiled.as_text(), mesh.nodes),
        }
    result["peak_counting_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


class _Clock:
    """Seconds since the last lap; the first lap began with the process."""

    def __init__(self):
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        age = uptime - int(stat[19]) / 100  # clock ticks
        self.began = self.last = time.perf_counter() - age, 0.0

    def lap(self) -> dict[str, float]:
        before, self.last = self.last, (time.perf_counter(), time.process_time())
        return self._between(before)

    def total(self) -> dict[str, float]:
        return self._between(self.began)

    def _between(self, before: tuple[float, float]) -> dict[str, float]:
        return {
            key: now - then
            for key, now, then in zip(("wall_s", "cpu_s"), self.last, before, strict=True)
        }


def _parallelism(
    config: MoEConfig, mesh: RankMesh, plan: Path | None
) -> tuple[Parallelism, list[SlotTable] | None]:
    if plan is None:
        table = ep_table(config.routed_experts, mesh.ranks, -config.routed_experts % mesh.ranks)
        return Parallelism(table=table, axes=mesh.axes), None
    tables = plan_tables(read_plan(plan), config, mesh.ranks)
    widest = max(tables, key=lambda table: table.max_copies)
    return Parallelism(table=widest, axes=mesh.axes), tables


def _decode_logits(config: MoEConfig, parallelism: Parallelism):
    """The decode step up to its scores: all that it exchanges, and what can be compared."""
    graph, _ = abstract_model(config, parallelism, "float32")

    def logits(params, caches, inputs):
        model = nnx.merge(graph, params)
        hidden, _ = model.main.decode((inputs.tokens,), caches, (inputs.lengths,))
        return model.main.logits(hidden[0])

    return logits


def _reference(config: MoEConfig, params, prompts: np.ndarray) -> np.ndarray:
    """Scores `[sequences, tokens, vocab]` of the unsharded model without a cache."""
    graph, _ = abstract_model(config, one_rank(config), "float32")

    @jax.jit
    def scores(params, tokens) -> jax.Array:
        model: MoEModel = nnx.merge(graph, params)
        return model(tokens)

    parts = np.array_split(prompts, -(-len(prompts) // _REFERENCE))
    return np.concatenate([scores(params, jnp.asarray(part, jnp.int32)) for part in parts])


def _bytes(found, mesh: RankMesh) -> dict[str, Any]:
    """What was counted, by exchange and in all, by tier."""

    def tiers(field):
        return tier_bytes(pair_bytes(field), mesh)

    moved = {name: tiers(each.moved) for name, each in found.items()}
    payload = {name: tiers for name, tiers in moved.items() if not name.startswith("flags")}
    rows = [tiers(each.rows) for each in found.values() if each.rows is not None]
    # What virtual ranks of a node gather is the same array, and crosses to their device once.
    once = {
        name: tiers["supernode"] // (mesh.ranks // mesh.nodes if "all_gather" in name else 1)
        for name, tiers in payload.items()
    }
    return {
        "exchanges": moved,
        "moved": _sum(payload.values()),
        "rows": _sum(rows),
        "between_devices": sum(once.values()),
    }


def _sum(tiers) -> dict[str, int]:
    tiers = list(tiers)
    return {name: sum(each[name] for each in tiers) for name in (tiers[0] if tiers else ())}


def _priced(
    config: MoEConfig,
    parallelism: Parallelism,
    mesh: RankMesh,
    phase: str,
    prompt: int,
    tokens: int,
) -> dict[str, Any]:
    """What the price of the same step on the same mesh assumes: with full blocks, at a load of 1,
    and of the rows alone (that is, without collectives)."""
    requests, length, rows = jax.export.symbolic_shape("requests, length, slot_rows")
    build = abstract_decode
    if phase == "prefill":
        build = functools.partial(abstract_prefill, sequence_parallel=mesh.ranks > 1)
    step = build(
        config,
        Schedule(),
        parallelism.table,
        mesh,
        requests,
        length,
        capacity=rows,
        precision="float32",
        kv_cache="float32",
        mtp=0,
    )
    lifted = on_every_rank(step.fn, mesh, step.in_specs, step.out_specs, abstract=True)
    program = trace(lifted, *step.args)
    copies = config.experts_per_token + parallelism.table.has_shared
    sizes = {"requests": 1.0, "length": float(prompt)}
    names = program.symbols

    def at(slot_rows: float) -> dict[str, float]:
        given = {k: v for k, v in (sizes | {"slot_rows": slot_rows}).items() if k in names}
        return priced_bytes(program, given, mesh)

    full, even, none = at(tokens), at(tokens * copies / parallelism.table.slots), at(0.0)
    return {
        "priced_moved": full,
        "priced_rows": {tier: even[tier] - none[tier] for tier in even},
        "rows_sent": 2 * config.moe_layers * mesh.ranks * tokens * copies * config.hidden_size * 4,
    }


def main(options: Worker) -> None:
    replace_text(options.json, json.dumps(run(options), indent=1) + "\n")


if __name__ == "__main__":
    leave(run_program(main, Worker, __doc__))
