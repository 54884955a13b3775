"""How long a training step of a mixture of experts takes, and how its experts are best spread.

    devices = data x pipeline,    `expert` replicas in a row share the experts of a layer

A step is made of `cmjax.parallelism.expert_pieces`. `overlap` hides reductions, and exchanges
behind the computation of another micro-batch, as DualPipe does (DeepSeek-V3, arXiv 2412.19437,
section 3.2): the longer of the two is waited for.

Ranks are loaded evenly; none of them drops a token. `recompute=selective` computes attention again,
`full` the whole layer, its exchanges too. Tensor parallelism, 8-bit products, kernels that put rows
in the order of experts (`cmjax.primitives.permute`) and the prediction of several tokens are left
out.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp

from cmjax.hardware import TIERS, Supernode
from cmjax.models.moe.config import LayerKind
from cmjax.parallelism.eager import only
from cmjax.parallelism.expert_pieces import (
    ExpertPiece,
    MoETraining,
    Sharing,
    dimensions,
    ends_piece,
    layer_piece,
)
from cmjax.parallelism.links import layout
from cmjax.parallelism.memory import MIXED, Memory, Precision, fits
from cmjax.parallelism.pieces import BATCH
from cmjax.parallelism.plan import Plan, Recompute
from cmjax.parallelism.pricing import LinkPrices, On, StepTime, pair
from cmjax.parallelism.result import PricedPlan, priced
from cmjax.parallelism.schedules import StageTimes, in_flight, pipeline_s
from cmjax.parallelism.search import LONG, OPTIMIZERS, Found, check_devices, fits_nowhere, too_large
from cmjax.parallelism.traffic import all_reduce, between
from cmjax.program import Operation, Program, Size
from cmjax.program.work import COMPUTE


def price_experts(
    training: MoETraining, machine: Supernode, plan: Plan, global_batch: int
) -> PricedPlan:
    """One plan, priced.

    Raises: ValueError: degrees that do not divide, more devices than the machine has, or a plan
      that does not fit.
    """
    training.check(plan, global_batch)
    check_devices(plan.devices, machine)
    memory = expert_memory(training, plan, machine, global_batch)
    if not fits(memory, machine):
        raise ValueError(
            f"plan: {too_large(memory.peak, machine)}; recompute=full, a larger pipeline, expert "
            "or context degree or a smaller micro_batch would help"
        )
    return _priced(training, LinkPrices(machine), plan, memory, global_batch)


def search_experts(
    training: MoETraining,
    machine: Supernode,
    devices: int,
    global_batch: int,
    *,
    top: int = 5,
    overlap: bool = True,
) -> Found:
    """The fastest plans that fit: every pipeline and share of experts that divides, replicas
    closest together, the optimizer spread, and gradients and parameters if they have to be.

    Raises: ValueError: none divides, or none fits; the message says by how much.
    """
    check_devices(devices, machine)
    prices, found = LinkPrices(machine), list[PricedPlan]()
    considered, least = 0, None
    for plan in _candidates(training, devices, overlap):
        try:
            training.check(plan, global_batch)
        except ValueError:
            continue
        considered += 1
        for optimizer in OPTIMIZERS[1:]:  # spread as little as fits
            option = dataclasses.replace(plan, optimizer=optimizer)
            memory = expert_memory(training, option, machine, global_batch)
            least = min(least or (memory.peak, option), (memory.peak, option), key=lambda x: x[0])
            if fits(memory, machine):
                found.append(_priced(training, prices, option, memory, global_batch))
                break
    if least is None:
        raise ValueError(
            f"no plan divides {devices} devices, {training.model.routed_experts} experts and a "
            f"global batch of {global_batch}; try a global batch that the devices divide"
        )
    if not found:
        raise ValueError(fits_nowhere(devices, machine, *least))
    fastest = sorted(found, key=lambda plan: plan.step_s)
    return Found(plans=tuple(fastest[:top]), considered=considered, feasible=len(found))


def expert_traffic(
    training: MoETraining, plan: Plan, machine: Supernode, global_batch: int
) -> dict[str, float]:
    """Bytes of a step, of all ranks, by tier of links: dispatch, combine and their transposes, what
    stages pass on, gradients over the ranks that hold the same, and, with a spread optimizer, their
    parameters, all in half precision; loads of experts, in single.

    `ExpertStep.traffic` counts the same of a step that runs with as large a `capacity`.

    Raises: ValueError: degrees that do not divide.
    """
    training.check(plan, global_batch)
    on, m = _layout(plan, machine), plan.micro_batches(global_batch)
    sent: dict[str, float] = dict.fromkeys(TIERS, 0.0)
    rounds = _rounds(training, plan, m)

    def add(nbytes: Mapping[str, float]) -> None:
        for tier in TIERS:
            sent[tier] += nbytes[tier] * plan.data  # ranks of a stage

    for kind, count in training.layers.items():
        layer = layer_piece(training, kind, plan.recompute_of_all, _sharing(plan, on))
        totals = layer.both().totals({BATCH: float(plan.micro_batch)})
        add({tier: float(totals[f"{tier}_bytes"]) * m * count for tier in TIERS})
        loads, times = layer.loads * count, rounds.layers * MIXED.parameter
        add(all_reduce((layer.shared * count - loads) * times, on["data"], machine))
        add(all_reduce(4 * loads, on["data"], machine))
        add(all_reduce(layer.experts * count * times, on["copies"], machine))
    add(all_reduce(rounds.ends * MIXED.parameter, on["data"], machine))
    stream = MIXED.parameter * _tokens(training, plan) * training.model.hidden_size
    for stage in range(plan.pipeline - 1):
        add(between(stage, stage + 1, on["pipeline"], 2 * m * stream))
    words = MIXED.parameter * _words(training, plan)
    add(between(0, plan.pipeline - 1, on["pipeline"], 2 * words))
    return sent


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """What goes through all-reduces in a step; a reduce-scatter and an all-gather are half of one.

    Fields:
      layers: how often what a rank holds of them does. ends: elements of both ends of the model.
    """

    layers: float
    ends: float


def _rounds(training: MoETraining, plan: Plan, micro_batches: int) -> _Rounds:
    """Once, but for what nobody holds all of: gradients of every micro-batch are reduced (zero2),
    and parameters are gathered for both passes of a layer, and once for the ends (zero3). Words
    that both ends have of one array are then reduced, and gathered, for each of them."""
    m, ends = micro_batches, ends_piece(training).shared
    words = training.model.vocab_size * training.model.hidden_size * training.model.tie_embeddings
    if plan.pipeline > 1:
        ends, words = ends + words, 0  # each end has a copy
    if plan.optimizer == "zero3":
        return _Rounds(1.5 * m, m * (ends + words))
    if plan.optimizer == "zero2":
        return _Rounds((m + 1) / 2, (m + 1) / 2 * ends + m / 2 * words)
    return _Rounds(1, ends)


def _words(training: MoETraining, plan: Plan) -> float:
    """Gradients of the words that the two ends of a pipeline exchange, of a rank."""
    if plan.pipeline == 1 or not training.model.tie_embeddings:
        return 0.0
    shards = 1 if plan.optimizer == "none" else plan.data
    return training.model.vocab_size * training.model.hidden_size / shards


def _candidates(training: MoETraining, devices: int, overlap: bool) -> Iterator[Plan]:
    stages = [p for p in range(1, training.model.layers + 1) if devices % p == 0]
    for pipeline, recompute, micro_batch, schedule in itertools.product(
        stages, ("none", "selective", "full"), (1, 2, 4), ("1f1b", "zero_bubble")
    ):
        if pipeline == 1 and schedule != "1f1b":
            continue
        data = devices // pipeline
        for share in (e for e in range(1, data + 1) if data % e == 0):
            for context in _contexts(training, data, share) if micro_batch == 1 else [1]:
                yield Plan(
                    data=data, pipeline=pipeline, expert=share, micro_batch=micro_batch,
                    recompute=recompute, schedule=schedule, optimizer="zero1", overlap=overlap,
                    context=context, order=("tensor", "data", "pipeline"),
                )  # fmt: skip


def _contexts(training: MoETraining, data: int, share: int) -> list[int]:
    """Ranks that may share long sequences, of those that share experts or of all replicas: powers
    of two."""
    most = (share if share > 1 else data) if training.sequence >= LONG else 1
    return [1 << n for n in range(most.bit_length()) if most % (1 << n) == 0]


def _priced(
    training: MoETraining, prices: LinkPrices, plan: Plan, memory: Memory, global_batch: int
) -> PricedPlan:
    time = _step(training, prices, plan, global_batch)
    peak = float(prices.machine.chip.cube_flops_16bit)
    return priced(training, plan, global_batch, time, memory, peak)


def _step(training: MoETraining, prices: LinkPrices, plan: Plan, global_batch: int) -> StepTime:
    p, b, m = plan.pipeline, plan.micro_batch, plan.micro_batches(global_batch)
    on = _layout(plan, prices.machine)
    seconds = {
        kind: _seconds(
            layer_piece(training, kind, plan.recompute_of_all, _sharing(plan, on)),
            prices, b, hidden=plan.overlap,
        )
        for kind in training.layers
    }  # fmt: skip
    ends = _seconds(ends_piece(training, plan.context), prices, b, hidden=False)
    numbers = list(map(len, training.stages(plan)))
    stage, last = max(numbers), numbers[-1]
    slowest = max(stage * seconds["moe"].both, last * seconds["moe"].both + ends.both)
    total = sum(n * seconds[kind].both for kind, n in training.layers.items()) + ends.both
    # A third of the computation gives gradients of weights, as of products (2401.10241).
    weights = total / 3 if plan.schedule == "zero_bubble" else 0.0
    sent = _tokens(training, plan) * training.model.hidden_size
    send = prices.collective("send", sent, on["pipeline"]) if p > 1 else 0.0
    times = StageTimes(slowest=slowest, total=max(total, slowest), weights=weights, send=send)
    pipeline = pipeline_s(plan.schedule, times, m, p)
    shared, experts = _held(training, plan, on)
    rounds, ends_held = _rounds(training, plan, m), ends_piece(training).shared
    reduced = prices.collective("all_reduce", shared, on["data"])
    reduced += prices.collective("all_reduce", experts, on["copies"])
    reduced *= rounds.layers
    if (of_ends := rounds.ends / ends_held) != rounds.layers:
        once = prices.collective("all_reduce", ends_held / min(p, 2), on["data"])
        reduced += (of_ends - rounds.layers) * once
    # Links that exchange carry nothing else.
    free = slowest - stage * seconds["moe"].exchanging
    backward = min(free, slowest - stage * seconds["moe"].forward)
    hidden = {"zero2": m * backward, "zero3": m * free}.get(plan.optimizer, backward)
    reduction = max(0.0, reduced - (hidden if plan.overlap else 0.0))
    by = (1, 1) if plan.optimizer == "none" else (plan.data, plan.data // plan.expert)
    update = prices.update(shared / by[0] + experts / by[1])
    tied = prices.collective("all_reduce", _words(training, plan), pair(on["pipeline"]))
    return StepTime(
        pipeline=pipeline, busy=m * slowest, reduction=reduction, optimizer=update, tied=tied
    )


def expert_memory(
    training: MoETraining,
    plan: Plan,
    machine: Supernode,
    global_batch: int,
    precision: Precision = MIXED,
) -> Memory:
    """Of the stage that needs most: where a plan does not say how many layers stages have, the
    first or the last.

    Raises: ValueError: degrees that do not divide.
    """
    training.check(plan, global_batch)
    stages = range(plan.pipeline) if plan.layers else {0, plan.pipeline - 1}
    found = [_stage(training, plan, machine, global_batch, precision, stage) for stage in stages]
    return max(found, key=lambda memory: memory.peak)


def _stage(
    training: MoETraining,
    plan: Plan,
    machine: Supernode,
    global_batch: int,
    precision: Precision,
    stage: int,
) -> Memory:
    model, m, on = training.model, plan.micro_batches(global_batch), _layout(plan, machine)
    counts = collections.Counter[LayerKind](map(model.kind, training.stages(plan)[stage]))
    at_ends = (stage == 0) + (stage == plan.pipeline - 1)
    dtype = jnp.dtype(precision.dtype)

    def layer(kind: LayerKind, recompute: Recompute) -> ExpertPiece:
        return layer_piece(training, kind, recompute, _sharing(plan, on), dtype.name)

    def at(size: Size) -> float:
        return float(size.evaluate({BATCH: float(plan.micro_batch)}))

    layers = {kind: layer(kind, plan.recompute_of_all) for kind in counts}
    ends = ends_piece(training, plan.context, dtype.name)
    shared = sum(n * layers[kind].shared for kind, n in counts.items())
    shared += ends.shared * at_ends / 2
    experts = sum(n * layers[kind].experts for kind, n in counts.items())
    flying = in_flight(plan.schedule, m, plan.pipeline, stage=stage)
    keeping = [layers]
    if plan.schedule == "zero_bubble":  # gradients of weights wait, with what they are made of
        keeping.append({kind: layer(kind, "selective") for kind in counts})
    kept = sum(n * max(at(each[kind].kept) for each in keeping) for kind, n in counts.items())
    at_end = at(ends.kept) if stage == plan.pipeline - 1 else 0.0
    # The loss is differentiated as soon as it is there, but under GPipe.
    at_end *= flying if plan.schedule == "gpipe" else 1.0
    # A layer's backward pass has the gradients of its widest array, before and after an
    # activation, and makes those of its parameters before they are added up.
    tokens = _tokens(training, plan)
    buffers = dtype.itemsize * 2.0 * tokens * _width(training, counts)
    buffers += dtype.itemsize * max(
        (each.shared + each.experts for each in layers.values()), default=0
    )
    if plan.recompute_of_all != "none":
        whole = {kind: at(layer(kind, "none").kept) for kind in counts}
        buffers += max((whole[kind] - at(layers[kind].kept) for kind in counts), default=0.0)
    if plan.pipeline > 1:
        buffers += 2.0 * dtype.itemsize * tokens * model.hidden_size
    if plan.optimizer == "zero3":
        each = (layer.shared + layer.experts for layer in layers.values())
        buffers += 2 * precision.parameter * max(each, default=0)
    count = shared + experts
    spread = shared / plan.data + experts / (plan.data // plan.expert)
    held = OPTIMIZERS.index(plan.optimizer)
    return Memory(
        parameters=precision.parameter * (spread if held > 2 else count),
        gradients=precision.gradient * (spread if held > 1 else count),
        optimizer=precision.optimizer * (spread if held > 0 else count),
        activations=flying * kept + at_end,
        buffers=buffers,
    )


def _width(training: MoETraining, kinds: Iterable[LayerKind]) -> int:
    """Elements per token of a layer's widest array: attention's scores, the rows of all experts
    that a token visits, or a dense block."""
    model = training.model
    rows = model.experts_per_token * max(model.hidden_size, 2 * model.expert_ffn_size)
    blocks = {"moe": rows, "dense": 2 * model.ffn_size}
    return max([model.heads * training.sequence, *(blocks[kind] for kind in kinds)])


def _tokens(training: MoETraining, plan: Plan) -> float:
    """Of a micro-batch, on a rank."""
    return plan.micro_batch * training.sequence / plan.context


def _sharing(plan: Plan, on: Mapping[str, On]) -> Sharing:
    """Of a layer, among ranks that lie so."""
    alone = (1, 1, 1)
    return Sharing(plan.expert, plan.context, on["expert"], on.get("context", alone))


def _held(training: MoETraining, plan: Plan, on: Mapping[str, On]) -> tuple[float, float]:
    """Parameters of a device of the fullest stage: what every replica holds, and experts."""
    layer = layer_piece(training, "moe", plan.recompute_of_all, _sharing(plan, on))
    numbers, ends = list(map(len, training.stages(plan))), ends_piece(training).shared
    most, outer = max(numbers), max(numbers[0], numbers[-1])
    of_ends = ends / min(plan.pipeline, 2)
    shared = max(most * layer.shared, outer * layer.shared + of_ends)
    return float(shared), float(most * layer.experts)


def _layout(plan: Plan, machine: Supernode) -> dict[str, On]:
    """Ranks by tier of the stages, the replicas, and, of these, those that share experts, those
    that share sequences, and those that have copies of an expert."""
    degrees = dimensions(plan)
    on = layout(tuple(degrees), degrees, machine)
    data = layout(
        [name for name in plan.order if name != "tensor"],
        {"data": plan.data, "pipeline": plan.pipeline}, machine,
    )["data"]  # fmt: skip
    return {**on, "data": data, "copies": data if plan.expert == 1 else on["replicas"]}


@dataclasses.dataclass(frozen=True)
class _Seconds:
    """Of a layer or an end: its forward pass, both passes, and what both take to exchange."""

    forward: float
    both: float
    exchanging: float


def _seconds(piece: ExpertPiece, prices: LinkPrices, batch: int, *, hidden: bool) -> _Seconds:
    """Of a micro-batch; with `hidden` exchanges the longer of exchanging and computing."""

    def parts(program: Program) -> tuple[float, float]:
        total = prices.run(program, BATCH, float(batch))
        computing = prices.run(only(program, _computes), BATCH, float(batch))
        return computing, total - computing

    taken = max if hidden else lambda computing, exchanging: computing + exchanging
    forward, both = parts(piece.forward()), parts(piece.both())
    return _Seconds(taken(*forward), taken(*both), both[1])


def _computes(operation: Operation) -> bool:
    return operation.work.kind in COMPUTE
