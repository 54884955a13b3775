"""Bytes that a plan's step sends over every tier of links, of the programs that are priced.

    layers and ends (tensor parallelism)  +  transfers between stages  +  gradients and parameters
    over the replicas  +  gradients of what several ranks hold copies of

`TrainStep.traffic` counts the same of a step that runs; the tests hold the two equal to the byte.
"""

import dataclasses

from cmjax.hardware import TIERS, Supernode
from cmjax.models.dense import DenseConfig
from cmjax.models.dense.model import own_words
from cmjax.parallelism import pieces
from cmjax.parallelism.links import on_any_links, plan_layout, reach, share_sizes, shares
from cmjax.parallelism.memory import PARAMETER_BYTES, split_of
from cmjax.parallelism.plan import Plan

On = tuple[int, int, int]
Bytes = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanTraffic:
    """Bytes of a step, of all ranks, by tier of links (`die`, `node`, `supernode`).

    Fields:
      tensor: inside layers and ends, keys and values of shared sequences too.
      pipeline: between stages.
      data: gradients, and parameters, over the replicas.
      copies: gradients of words that two stages hold, and of norms that all tensor ranks hold.
    """

    tensor: Bytes
    pipeline: Bytes
    data: Bytes
    copies: Bytes

    @property
    def tier_bytes(self) -> Bytes:
        parts = (self.tensor, self.pipeline, self.data, self.copies)
        return {tier: sum(part[tier] for part in parts) for tier in TIERS}


def plan_traffic(
    model: DenseConfig, plan: Plan, machine: Supernode, global_batch: int
) -> PlanTraffic:
    """Bytes of a step of a plan that divides (`Plan.check`), in half precision.

    >>> from cmjax.hardware import load_machine
    >>> from cmjax.models.dense import preset
    >>> from cmjax.parallelism import parse_plan, plan_traffic
    >>> plan = parse_plan("data=16,tensor=8,pipeline=16,optimizer=zero1")
    >>> found = plan_traffic(preset("pangu-200b"), plan, load_machine("ascend910-2048"), 512)
    >>> f"{found.data['supernode'] / 2048 / 1e9:.1f} GB a device between racks"
    '6.1 GB a device between racks'
    """
    on = plan_layout(plan, machine)
    m, split = plan.micro_batches(global_batch), split_of(plan)
    columns = plan.data * plan.tensor  # ranks of a stage

    def inside(piece: pieces.Piece) -> Bytes:
        if not piece.groups:
            return _plus()
        groups = {name: (ranks, reach(on[name])) for name, ranks in piece.groups.items()}
        program = on_any_links(piece.programs["both"](), groups)
        sizes = {pieces.BATCH: float(plan.micro_batch)} | share_sizes(groups, on, machine)
        totals = program.totals({k: v for k, v in sizes.items() if k in program.symbols})
        return {tier: float(totals[f"{tier}_bytes"]) * m * columns for tier in TIERS}

    counts = plan.counts(model.layers)
    last = counts[-1].mode_of(counts[-1].layers - 1)
    ends = pieces.embedding(model, split), pieces.output(model, split, last)
    layers = []
    for mode in plan.modes:
        many = plan.interleave * sum(each.by_mode.get(mode, 0) for each in counts)
        many -= model.query_layer and mode == last
        layers.append(_times(inside(pieces.layer(model, split, mode)), many))
    everywhere = sum(exchanged(model, plan, m, stage) for stage in range(plan.pipeline))
    summed = copied(model, plan) * PARAMETER_BYTES
    words = _words(model, plan) * PARAMETER_BYTES
    return PlanTraffic(
        tensor=_plus(*layers, *map(inside, ends)),
        pipeline=_times(_transfers(model, plan, machine, on), m * columns),
        data=_times(all_reduce(everywhere * PARAMETER_BYTES, on["data"], machine), columns),
        copies=_plus(
            _times(all_reduce(summed, on["tensor"], machine), columns),
            _times(between(0, plan.pipeline - 1, on["pipeline"], words), 2 * columns),
        ),
    )


def exchanged(model: DenseConfig, plan: Plan, micro_batches: int, stage: int) -> float:
    """Parameters' worth of all-reduces over the replicas that a rank of a stage takes part in; a
    reduce-scatter or an all-gather is half of one.

    Without a spread optimizer gradients are all-reduced; with one they are reduce-scattered, and
    parameters gathered. Nobody holds all gradients under zero2: every micro-batch is reduced. Under
    zero3 parameters are gathered wherever they are used: in a layer's forward and backward pass.
    """
    split, m = split_of(plan), micro_batches
    layer = pieces.layer(model, split, "none").parameters
    words = own_words(model, split) * model.hidden
    first, last = stage == 0, stage == plan.pipeline - 1
    query = layer if last and model.query_layer else 0
    layers = plan.stages(model.layers)[stage] * plan.interleave * layer - query
    embedding = pieces.embedding(model, split).parameters if first else 0
    output = 0
    if last:
        output = pieces.output(model, split, "none").parameters
        output += words if plan.pipeline > 1 or not model.tied else 0
    # Words that both ends have of one array are reduced, and gathered, for each of them.
    again = words if last and model.tied and plan.pipeline == 1 else 0
    if plan.optimizer == "zero3":  # the output's two passes are one
        return m * (1.5 * (layers + embedding) + output + again)
    whole = layers + embedding + output
    return (m + 1) / 2 * whole + m / 2 * again if plan.optimizer == "zero2" else whole


def copied(model: DenseConfig, plan: Plan) -> float:
    """Parameters of all stages that every tensor-parallel rank holds and, with sequence
    parallelism, applies to its own part of the sequence: gradients to be added up, of a rank."""
    if not split_of(plan).sequence:
        return 0.0
    norm = model.hidden * (2 if model.norm == "layer" else 1)
    each = 2 * norm + (2 * model.hidden if model.biases else 0)
    return (model.layers * each + norm) / _shards(plan)


def _words(model: DenseConfig, plan: Plan) -> float:
    """Gradients of the words that the two ends of a pipeline exchange, of a rank."""
    if plan.pipeline == 1 or not model.tied:
        return 0.0
    return own_words(model, split_of(plan)) * model.hidden / _shards(plan)


def _shards(plan: Plan) -> int:
    return 1 if plan.optimizer == "none" else plan.data


def _transfers(model: DenseConfig, plan: Plan, machine: Supernode, on: dict[str, On]) -> Bytes:
    """Of a micro-batch and a rank of every stage: each chunk's output, and its gradient."""
    split, p = split_of(plan), plan.pipeline
    part = pieces.part_between_layers(model, split)
    nbytes = PARAMETER_BYTES * plan.micro_batch * part * model.hidden
    each, gathered = nbytes, _plus()
    if plan.tensor > 1 and not split.sequence:
        each = nbytes / plan.tensor
        gathered = _times(all_reduce(nbytes, on["tensor"], machine), 0.5)
    found = [_plus()]
    for chunk in range(plan.interleave):
        hops = [(s, s + 1) for s in range(p - 1)]
        hops += [(p - 1, 0)] if chunk < plan.interleave - 1 else []
        found += [_plus(between(a, b, on["pipeline"], each), gathered) for a, b in hops]
    return _times(_plus(*found), 2)


def between(source: int, destination: int, on: On, nbytes: float) -> Bytes:
    """One rank's bytes to another of a group, on the links between the two."""
    a, b, _ = on
    if source == destination:
        return _plus()
    if source // a == destination // a:
        tier = TIERS[0]
    else:
        tier = TIERS[1] if source // (a * b) == destination // (a * b) else TIERS[2]
    return {**_plus(), tier: nbytes}


def all_reduce(nbytes: float, on: On, machine: Supernode) -> Bytes:
    """What a rank of a group sends in an all-reduce of so many bytes, by tier."""
    return {
        tier: 2 * nbytes * share for tier, share in zip(TIERS, shares(on, machine), strict=True)
    }


def _plus(*parts: Bytes) -> Bytes:
    return {tier: sum((part[tier] for part in parts), 0.0) for tier in TIERS}


def _times(part: Bytes, count: float) -> Bytes:
    return {tier: value * count for tier, value in part.items()}
