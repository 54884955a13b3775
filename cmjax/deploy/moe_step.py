"""Deployments of a mixture of experts: which experts sit where, which streams, as traced steps.

The defaults are the published systems: the decode of CloudMatrix-Infer (EP320, one expert per die,
shared replicas in slots), and its prefill (EP32, SP -> TP -> SP attention) under an engine that has
it; elsewhere DeepSeek's own data-parallel attention with overlapped exchanges.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx

from cmjax.cost.ranks import mesh_for, mesh_over, mesh_spread
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.step import DecodeSizes, MoEStep, PrefillSizes
from cmjax.hardware import Supernode
from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.models.moe.arithmetic import Arithmetic, KVCache
from cmjax.models.moe.checkpoint.hf_config import load_config
from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.layers.cache import empty_cache
from cmjax.models.moe.layers.moe import MoE, run_moe
from cmjax.models.moe.parallelism import Parallelism, check_tensor
from cmjax.models.moe.schedule import Schedule, overlapped_exchange, two_stream_decode
from cmjax.models.moe.slots import SlotTable, ep_table, published_table
from cmjax.models.moe.steps import abstract_decode, abstract_prefill
from cmjax.program.size import Size
from cmjax.program.work import Operand

_ARITHMETIC = {"int8": "int8", "bf16": "bfloat16"}
_MOST_SPLIT = 32
"""Ranks over which prefill splits its heads: those of the published instance."""
_KV_CACHE: dict[str, KVCache] = {"bf16": "bfloat16", "int8": "int8", "mxfp4": "mxfp4"}


def decode_step(machine: Supernode) -> MoEStep:
    """The default decode instance: `cmjax price cmjax.deploy:decode_step --size batch=96 ...`."""
    return build_step(Deployment(phase="decode", microbatches=2), machine)


def prefill_step(machine: Supernode) -> MoEStep:
    """The default prefill instance: `cmjax price cmjax.deploy:prefill_step --size batch=4 ...`."""
    return build_step(Deployment(phase="prefill", microbatches=2), machine)


def slots_of(deployment: Deployment, config: MoEConfig, ranks: int) -> SlotTable:
    """The expert slots of a group of ranks: those of the published deployments, or as many copies
    as the deployment says, with the shared expert on every rank.

    Raises: ValueError: copies of no experts, or slots that do not divide over the ranks.
    """
    if deployment.redundant is None:
        return published_table(config, ranks, phase=deployment.phase)
    if config.dense:
        raise ValueError(f"redundant {deployment.redundant}: {deployment.model} has no experts")
    slots = config.routed_experts + deployment.redundant
    if slots % ranks:
        least = -(-config.routed_experts // ranks) * ranks
        near = sorted({max(slots - slots % ranks, least), slots + -slots % ranks})
        would = " or ".join(str(n - config.routed_experts) for n in near)
        raise ValueError(
            f"redundant {deployment.redundant}: with {config.routed_experts} experts {slots} "
            f"slots, which do not divide over {ranks} ranks; {would} would"
        )
    return ep_table(config.routed_experts, ranks, deployment.redundant)


def build_step(
    deployment: Deployment, machine: Supernode, table: SlotTable | None = None
) -> MoEStep:
    """The step of a deployment, its sizes named `batch` (requests per NPU), `context` or `prompt`,
    and `load` (rows on the slowest rank over the mean; one number, or one per MoE layer).

    Args:
      deployment: with 1 or 2 microbatches.
      machine: its counts matter, its constants do not.
      table: slots of the experts (default: those of the published deployments).
    Raises: ValueError: unknown model, an EP or TP degree that ranks, experts or heads do not allow.
    """
    deployment.check()
    if deployment.microbatches == "auto":
        raise ValueError("build_step: microbatches must be 1 or 2; 'auto' is decided by predict")
    config = load_config(deployment.model)
    npus = deployment.instance_npus
    ranks = npus * machine.dies_per_npu
    if npus > machine.npus:
        raise ValueError(f"npus {npus}: {machine.name} has {machine.npus}")
    ep = deployment.ep or ranks
    if ep > ranks:
        raise ValueError(f"ep {ep} is larger than the {ranks} ranks of {npus} NPUs")
    if ranks % ep:
        raise ValueError(f"ep {ep} does not divide the {ranks} ranks of {npus} NPUs")
    check_tensor(config, deployment.tp)
    if ep % deployment.tp:
        raise ValueError(
            f"tp {deployment.tp} does not divide the {ep} ranks that share the experts; give ep or "
            f"npus that it divides"
        )
    mesh = _mesh(ep, machine, deployment.tp)
    if table is None:
        table = slots_of(deployment, config, ep)
    elif table.ranks != ep:
        raise ValueError(f"plan: made for {table.ranks} ranks; the deployment has {ep}")
    schedule = schedule_for(machine, deployment)
    # Among a few ranks only: each gathers the latents of all.
    splits = isinstance(config.attention, LatentAttention) and config.heads % ep == 0
    splits = splits and deployment.tp == 1 and ep <= _MOST_SPLIT and not deployment.decoding
    sequence_parallel = machine.running().prefill_by_heads and splits
    sharing = ep if sequence_parallel else deployment.tp
    drafting = deployment.mtp and config.mtp_layers > 0
    drafts = (deployment.drafts if deployment.decoding else 1) * drafting
    copies = 0 if config.dense else config.experts_per_token + table.has_shared
    requests, length, rows = jax.export.symbolic_shape("requests, length, slot_rows")
    common = {
        "capacity": rows,
        "precision": dataclasses.replace(
            Arithmetic.of(_ARITHMETIC.get(deployment.quant, deployment.quant)),
            attention=deployment.attention,
        ),
        "kv_cache": _KV_CACHE[deployment.kv_cache],
        "mtp": drafts,
        "permutes": machine.exchange.bulk_kernels,
    }
    if deployment.phase == "decode":
        ranked = abstract_decode(config, schedule, table, mesh, requests, length, **common)
    else:
        ranked = abstract_prefill(
            config,
            schedule,
            table,
            mesh,
            requests,
            length,
            sequence_parallel=sequence_parallel,
            **common,
        )
    sizes = DecodeSizes if deployment.decoding else PrefillSizes
    params, inputs = ranked.args
    state_bytes = _rank_bytes(inputs, ranked.in_specs[1])
    if not deployment.decoding:  # caches are no inputs; the step makes them
        of = config, requests, length, common["kv_cache"]
        cache = jax.eval_shape(lambda: empty_cache(*of, mtp=bool(drafts), tensor=deployment.tp))
        state_bytes = state_bytes + _nbytes(jax.tree.leaves(cache)) * schedule.microbatches
    return MoEStep(
        fn=on_every_rank(ranked.fn, mesh, ranked.in_specs, ranked.out_specs, abstract=True),
        args=ranked.args,
        sizes=sizes(
            microbatches=schedule.microbatches,
            dies_per_npu=machine.dies_per_npu,
            slots=table.slots,
            copies=copies,
            spread=sharing,
            drafts=drafts,
        ),
        weight_bytes=_rank_bytes(params, ranked.in_specs[0]),
        state_bytes=state_bytes,
        layers=config.moe_layers or config.layers,
        microbatches=schedule.microbatches,
        expert_slots=table.slots,
        experts=config.routed_experts,
        shared_slots=table.experts_of_slot.count(config.routed_experts),
        experts_per_token=config.experts_per_token,
        copies=copies,
        drafts=drafts,
        ranks=ep,
        sharing=sharing,
    )


def _mesh(ranks: int, machine: Supernode, tp: int) -> RankMesh:
    """Where the ranks lie; a group that shares requests lies in one node."""
    whole = mesh_for(ranks, machine)
    if tp not in whole.tensor_sizes:
        raise ValueError(
            f"tp {tp} on {machine.name}: {whole.ranks // whole.nodes} ranks of a node hold groups "
            f"of {', '.join(map(str, whole.tensor_sizes))}"
        )
    return mesh_for(ranks, machine, tp)


def build_layer(
    model: str,
    machine: Supernode,
    *,
    ranks: int,
    nodes: int | None,
    experts: int,
    redundant: int,
) -> MoEStep:
    """The MoE block of `model` with `experts` routed experts and no shared one, on `ranks` ranks.

    Its sizes are `tokens` per rank and `rows` on the slowest rank.
    """
    base = load_config(model)
    if base.dense:
        raise ValueError(f"{model}: all layers are dense; there are no experts to place")
    copies = min(base.experts_per_token, experts)
    config = dataclasses.replace(
        base,
        routed_experts=experts,
        experts_per_token=copies,
        expert_groups=1,
        groups_per_token=1,
        shared_experts=0,
    )
    mesh = mesh_spread(ranks, machine) if nodes is None else mesh_over(nodes, ranks, machine)
    table = ep_table(experts, ranks, redundant)
    tokens, rows = jax.export.symbolic_shape("tokens, slot_rows")
    parallelism = Parallelism(
        table=table,
        axes=mesh.axes,
        capacity=rows,
        permutes=machine.exchange.bulk_kernels,
    )
    graph, state = nnx.split(
        nnx.eval_shape(
            lambda: MoE(
                config, parallelism, arithmetic=Arithmetic.of("int8"), rngs=nnx.Rngs(params=0)
            )
        )
    )
    per_rank = jax.tree.map(lambda x: jax.ShapeDtypeStruct((ranks, *x.shape), x.dtype), state)
    x = jax.ShapeDtypeStruct((ranks, tokens, config.hidden_size), jnp.bfloat16)

    def block(state, x):
        moe = nnx.merge(graph, state)
        return run_moe(moe, x, moe.route(x))

    return MoEStep(
        fn=on_every_rank(block, mesh, (RANKED, RANKED), RANKED, abstract=True),
        args=(per_rank, x),
        sizes=lambda tokens, rows: {"tokens": tokens, "slot_rows": rows / table.slots},
        experts=experts,
        expert_slots=table.slots,
        experts_per_token=copies,
        copies=copies,
        ranks=ranks,
    )


def schedule_for(machine: Supernode, deployment: Deployment) -> Schedule:
    """Streams of the published systems; without microbatches everything is one stream."""
    if deployment.microbatches == 1:
        return Schedule()
    chip = machine.chip
    if deployment.phase == "decode" and chip.separate_vector_cores:
        return two_stream_decode(chip.cube_cores, chip.vector_cores)
    return overlapped_exchange("interleaved" if deployment.decoding else "stage")


def _rank_bytes(tree, specs) -> Size:
    """Bytes of one rank's share of abstract arguments."""
    shares = jax.tree.map(lambda spec, sub: jax.tree.map(lambda _: spec, sub), specs, tree)
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shares), strict=True)
    return _nbytes(
        jax.ShapeDtypeStruct(leaf.shape[spec is RANKED :], leaf.dtype) for leaf, spec in leaves
    )


def _nbytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> Size:
    return sum((Operand.of(array).nbytes for array in arrays), Size())
