"""How long a training step of a mixture of experts takes, and how its experts are best spread.

    devices = data x pipeline,    `expert` replicas in a row share the experts of a layer

The pieces are layers of `cmjax.models.moe`, differentiated and traced like those of a dense decoder
(`cmjax.parallelism.pieces`), with dispatch, combine and their transposes over the ranks that share
experts. `overlap` hides reductions, and exchanges behind the computation of another micro-batch, as
DualPipe does (DeepSeek-V3, arXiv 2412.19437, section 3.2): the longer of the two is waited for.

Ranks are loaded evenly; none of them drops a token. `recompute=selective` computes attention again,
`full` the whole layer, its exchanges too. Tensor parallelism, 8-bit products, kernels that put rows
in the order of experts (`cmjax.primitives.permute`) and the prediction of several tokens are left
out.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cmjax.hardware import TIERS, Supernode
from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.balancing import is_load
from cmjax.models.moe.config import LayerKind, MoEConfig
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.trained import trained, with_tables
from cmjax.parallelism.expert_program import EndsProgram, LayerProgram, of_experts
from cmjax.parallelism.links import layout
from cmjax.parallelism.memory import MIXED, Memory, Precision, fits
from cmjax.parallelism.pieces import BATCH, batch_symbol, kept_bytes
from cmjax.parallelism.plan import Plan, Recompute
from cmjax.parallelism.pricing import LinkPrices, On, StepTime
from cmjax.parallelism.result import PricedPlan, priced
from cmjax.parallelism.schedules import StageTimes, in_flight, pipeline_s
from cmjax.parallelism.search import Found, check_devices, too_large
from cmjax.parallelism.traffic import all_reduce
from cmjax.program import Program, Size, Work, trace

_AXIS = "expert"
_HALF = jnp.dtype(MIXED.dtype).name


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoETraining:
    """What is trained: a mixture of experts, on sequences of some length."""

    model: MoEConfig
    sequence: int

    def __post_init__(self):
        if self.model.dense:
            raise ValueError("MoETraining: the model has no layers with experts")

    @property
    def layers(self) -> dict[LayerKind, int]:
        """How many there are of each kind."""
        counts: dict[LayerKind, int] = {
            "moe": self.model.moe_layers,
            "dense": len(self.model.dense_layers),
        }
        return {kind: count for kind, count in counts.items() if count}

    @property
    def parameters(self) -> int:
        """Of the model, without its modules that predict further tokens."""
        layers = [(n, _layer(self, k, "none", 1, (1, 1, 1))) for k, n in self.layers.items()]
        return sum(n * (each.shared + each.experts) for n, each in [*layers, (1, _ends(self))])

    def flops_per_token(self) -> float:
        """Three times the matrix products of a forward pass, of one token."""
        return _flops_per_token(self)

    def check(self, plan: Plan, global_batch: int) -> None:
        """Raises: ValueError: a degree that does not divide what it splits."""
        experts, share = self.model.routed_experts, plan.expert
        if plan.data % share or experts % share:
            raise ValueError(
                f"plan: expert={share} must divide data={plan.data} and the {experts} experts"
            )
        if plan.tensor > 1 or plan.interleave > 1 or plan.sequence_parallel:
            raise ValueError(
                "plan: a mixture of experts is priced with tensor=1, interleave=1 and "
                "sequence_parallel=false"
            )
        if plan.pipeline > self.model.layers:
            raise ValueError(
                f"plan: pipeline={plan.pipeline} is more than the {self.model.layers} layers"
            )
        if global_batch % (plan.data * plan.micro_batch):
            raise ValueError(
                f"plan: data={plan.data} x micro_batch={plan.micro_batch} does not divide the "
                f"global batch of {global_batch}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertPiece:
    """A layer or an end on one rank: its programs, parameters that every replica holds and those
    of its experts, the balancing biases among the former, and bytes that it keeps of a micro-batch
    between the passes."""

    forward: Callable[[], Program]
    both: Callable[[], Program]
    shared: int
    experts: int
    loads: int
    kept: Size


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
            f"plan: {too_large(memory.peak, machine)}; recompute=full, a larger pipeline or expert "
            "degree or a smaller micro_batch would help"
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
    closest together, the optimizer spread.

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
        memory = expert_memory(training, plan, machine, global_batch)
        if least is None or memory.peak < least:
            least = memory.peak
        if fits(memory, machine):
            found.append(_priced(training, prices, plan, memory, global_batch))
    if least is None:
        raise ValueError(
            f"no plan divides {devices} devices, {training.model.routed_experts} experts and a "
            f"global batch of {global_batch}; try a global batch that the devices divide"
        )
    if not found:
        raise ValueError(
            f"the model fits nowhere on {devices} devices: {too_large(least, machine)} with the "
            "leanest plan; more devices or a device with more memory would help"
        )
    fastest = sorted(found, key=lambda plan: plan.step_s)
    return Found(plans=tuple(fastest[:top]), considered=considered, feasible=len(found))


def expert_traffic(
    training: MoETraining, plan: Plan, machine: Supernode, global_batch: int
) -> dict[str, float]:
    """Bytes of a step without a pipeline, of all ranks, by tier of links: dispatch, combine and
    their transposes, gradients over the ranks that hold the same, and, with a spread optimizer,
    their parameters, all in half precision; loads of experts, in single.

    `ExpertStep.traffic` counts the same of a step that runs with as large a `capacity`.

    Raises: ValueError: degrees that do not divide, or a pipeline.
    """
    training.check(plan, global_batch)
    if plan.pipeline > 1:
        raise ValueError(f"plan: traffic is counted with pipeline=1, got {plan.pipeline}")
    on, m = _layout(plan, machine), plan.micro_batches(global_batch)
    sent: dict[str, float] = dict.fromkeys(TIERS, 0.0)

    def add(nbytes: Mapping[str, float]) -> None:
        for tier in TIERS:
            sent[tier] += nbytes[tier] * plan.devices

    for kind, count in training.layers.items():
        layer = _layer(training, kind, plan.recompute, plan.expert, on["expert"])
        totals = layer.both().totals({BATCH: float(plan.micro_batch)})
        add({tier: float(totals[f"{tier}_bytes"]) * m * count for tier in TIERS})
        loads = layer.loads * count
        add(all_reduce((layer.shared * count - loads) * MIXED.parameter, on["data"], machine))
        add(all_reduce(4 * loads, on["data"], machine))
        add(all_reduce(layer.experts * count * MIXED.parameter, on["replicas"], machine))
    add(all_reduce(_ends(training).shared * MIXED.parameter, on["data"], machine))
    return sent


def _candidates(training: MoETraining, devices: int, overlap: bool) -> Iterator[Plan]:
    stages = [p for p in range(1, training.model.layers + 1) if devices % p == 0]
    for pipeline, recompute, micro_batch, schedule in itertools.product(
        stages, ("none", "selective", "full"), (1, 2, 4), ("1f1b", "zero_bubble")
    ):
        if pipeline == 1 and schedule != "1f1b":
            continue
        data = devices // pipeline
        for share in (e for e in range(1, data + 1) if data % e == 0):
            yield Plan(
                data=data, pipeline=pipeline, expert=share, micro_batch=micro_batch,
                recompute=recompute, schedule=schedule, optimizer="zero1", overlap=overlap,
                order=("tensor", "data", "pipeline"),
            )  # fmt: skip


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
            _layer(training, kind, plan.recompute, plan.expert, on["expert"]),
            prices, b, hidden=plan.overlap,
        )
        for kind in training.layers
    }  # fmt: skip
    ends = _seconds(_ends(training), prices, b, hidden=False)
    stage, last = _stages(training, plan)
    slowest = max(stage * seconds["moe"].both, last * seconds["moe"].both + ends.both)
    total = sum(n * seconds[kind].both for kind, n in training.layers.items()) + ends.both
    # A third of the computation gives gradients of weights, as of products (2401.10241).
    weights = total / 3 if plan.schedule == "zero_bubble" else 0.0
    sent = b * training.sequence * training.model.hidden_size
    send = prices.collective("send", sent, on["pipeline"]) if p > 1 else 0.0
    times = StageTimes(slowest=slowest, total=max(total, slowest), weights=weights, send=send)
    pipeline = pipeline_s(plan.schedule, times, m, p)
    shared, experts = _held(training, plan, on["expert"])
    reduced = prices.collective("all_reduce", shared, on["data"])
    reduced += prices.collective("all_reduce", experts, on["replicas"])
    backward = slowest - stage * seconds["moe"].forward
    reduction = max(0.0, reduced - (backward if plan.overlap else 0.0))
    by = (1, 1) if plan.optimizer == "none" else (plan.data, plan.data // plan.expert)
    update = prices.update(shared / by[0] + experts / by[1])
    return StepTime(
        pipeline=pipeline, busy=m * slowest, reduction=reduction, optimizer=update, tied=0.0
    )


def expert_memory(
    training: MoETraining,
    plan: Plan,
    machine: Supernode,
    global_batch: int,
    precision: Precision = MIXED,
) -> Memory:
    """Of the first or the last stage, whichever needs more.

    Raises: ValueError: degrees that do not divide.
    """
    training.check(plan, global_batch)
    stages = [_stage(training, plan, machine, global_batch, precision, first=True)]
    if plan.pipeline > 1:
        stages.append(_stage(training, plan, machine, global_batch, precision, first=False))
    return max(stages, key=lambda memory: memory.peak)


def _stage(
    training: MoETraining,
    plan: Plan,
    machine: Supernode,
    global_batch: int,
    precision: Precision,
    *,
    first: bool,
) -> Memory:
    model, m, on = training.model, plan.micro_batches(global_batch), _layout(plan, machine)
    each, last = _stages(training, plan)
    numbers = range(each) if first else range(model.layers - last, model.layers)
    counts = collections.Counter[LayerKind](map(model.kind, numbers))
    dtype = jnp.dtype(precision.dtype)

    def layer(kind: LayerKind, recompute: Recompute) -> ExpertPiece:
        return _layer(training, kind, recompute, plan.expert, on["expert"], dtype.name)

    def at(size: Size) -> float:
        return float(size.evaluate({BATCH: float(plan.micro_batch)}))

    layers = {kind: layer(kind, plan.recompute) for kind in counts}
    ends = _ends(training, dtype.name)
    shared = sum(n * layers[kind].shared for kind, n in counts.items())
    shared += ends.shared if plan.pipeline == 1 else ends.shared / 2
    experts = sum(n * layers[kind].experts for kind, n in counts.items())
    flying = in_flight(plan.schedule, m, plan.pipeline)
    if not first:
        flying = float(m) if plan.schedule == "gpipe" else 1.0
    kept = sum(n * at(layers[kind].kept) for kind, n in counts.items())
    if not first or plan.pipeline == 1:
        kept += at(ends.kept)
    # A layer's backward pass has the gradients of its widest array, before and after an
    # activation, and makes those of its parameters before they are added up.
    tokens = plan.micro_batch * training.sequence
    buffers = dtype.itemsize * 2.0 * tokens * _width(training, counts)
    buffers += dtype.itemsize * max(
        (each.shared + each.experts for each in layers.values()), default=0
    )
    if plan.recompute != "none":
        whole = {kind: at(layer(kind, "none").kept) for kind in counts}
        buffers += max((whole[kind] - at(layers[kind].kept) for kind in counts), default=0.0)
    if plan.pipeline > 1:
        buffers += 2.0 * dtype.itemsize * tokens * model.hidden_size
    count = shared + experts
    spread = shared / plan.data + experts / (plan.data // plan.expert)
    return Memory(
        parameters=precision.parameter * count,
        gradients=precision.gradient * count,
        optimizer=precision.optimizer * (count if plan.optimizer == "none" else spread),
        activations=flying * kept,
        buffers=buffers,
    )


def _width(training: MoETraining, kinds: Iterable[LayerKind]) -> int:
    """Elements per token of a layer's widest array: attention's scores, the rows of all experts
    that a token visits, or a dense block."""
    model = training.model
    rows = model.experts_per_token * max(model.hidden_size, 2 * model.expert_ffn_size)
    blocks = {"moe": rows, "dense": 2 * model.ffn_size}
    return max([model.heads * training.sequence, *(blocks[kind] for kind in kinds)])


def _stages(training: MoETraining, plan: Plan) -> tuple[int, int]:
    """Layers of all stages but the last, which has what is left, and of the last."""
    layers, p = training.model.layers, plan.pipeline
    each = math.ceil(layers / p)
    return each, max(0, layers - (p - 1) * each)


def _held(training: MoETraining, plan: Plan, on: On) -> tuple[float, float]:
    """Parameters of a device of the fullest stage: what every replica holds, and experts."""
    layer = _layer(training, "moe", plan.recompute, plan.expert, on)
    stage, last = _stages(training, plan)
    ends = _ends(training).shared
    first = stage * layer.shared + ends / 2
    shared = max(first, last * layer.shared + ends / 2) if plan.pipeline > 1 else first + ends / 2
    return float(shared), float(max(stage, last) * layer.experts)


def _layout(plan: Plan, machine: Supernode) -> dict[str, On]:
    """Ranks by tier of the stages, the replicas, and, of these, those that share experts."""
    degrees = {"expert": plan.expert, "replicas": plan.data // plan.expert}
    inner = {"tensor": (), "pipeline": ("pipeline",), "data": ("expert", "replicas")}
    order = [name for each in plan.order for name in inner[each]]
    on = layout(order, {**degrees, "pipeline": plan.pipeline}, machine)
    data = layout(
        [name for name in plan.order if name != "tensor"],
        {"data": plan.data, "pipeline": plan.pipeline}, machine,
    )["data"]  # fmt: skip
    return {**on, "data": data}


@dataclasses.dataclass(frozen=True)
class _Seconds:
    forward: float
    both: float


def _seconds(piece: ExpertPiece, prices: LinkPrices, batch: int, *, hidden: bool) -> _Seconds:
    """Of a micro-batch; with `hidden` exchanges the longer of exchanging and computing."""

    def one(program: Program) -> float:
        total = prices.run(program, BATCH, float(batch))
        if not hidden:
            return total
        computing = prices.run(_without_exchanges(program), BATCH, float(batch))
        return max(computing, total - computing)

    return _Seconds(one(piece.forward()), one(piece.both()))


@functools.lru_cache(maxsize=512)
def _without_exchanges(program: Program) -> Program:
    nothing = Work(launches=0.0)
    operations = tuple(
        op if op.work.kind in ("compute", "attention") else dataclasses.replace(op, work=nothing)
        for op in program.operations
    )
    return Program(operations, program.outputs, program.inputs)


@functools.lru_cache(maxsize=64)
def _flops_per_token(training: MoETraining) -> float:
    """Three times the matrix products of a forward pass on one rank."""
    on, whole = (1, 1, 1), {BATCH: 1.0}
    programs = [(n, _layer(training, k, "none", 1, on)) for k, n in training.layers.items()]
    flops = 0.0
    for count, piece in [*programs, (1, _ends(training))]:
        totals = piece.forward().totals(whole)
        flops += count * sum(totals[f"cube_flops_{bits}bit"] for bits in (8, 16, 32))
    return 3 * float(flops) / training.sequence


@functools.lru_cache(maxsize=512)
def _layer(
    training: MoETraining,
    kind: LayerKind,
    recompute: Recompute,
    share: int,
    on: On,
    dtype: str = _HALF,
) -> ExpertPiece:
    """A layer on one of `share` ranks that have a part of the experts each, `on` these tiers."""
    arithmetic = _arithmetic(dtype)
    model, batch = training.model, batch_symbol()
    parallelism = Parallelism(
        table=ep_table(model.routed_experts, share),
        axes=(_AXIS,) if share > 1 else (),
        # As many rows as tokens send on average: nobody is busier than others.
        capacity=batch * training.sequence * model.experts_per_token // model.routed_experts,
    )
    run = LayerProgram(model, parallelism, kind, recompute, arithmetic)
    x = jax.ShapeDtypeStruct((batch, training.sequence, model.hidden_size), arithmetic.dtype)
    return _piece(run, run.shapes, x, share, on)


@functools.lru_cache(maxsize=64)
def _ends(training: MoETraining, dtype: str = _HALF) -> ExpertPiece:
    """Embedding, final norm, head and loss, as one piece on one rank."""
    batch, arithmetic = batch_symbol(), _arithmetic(dtype)
    ends = EndsProgram(training.model, arithmetic)
    tokens = jax.ShapeDtypeStruct((batch, training.sequence), jnp.int32)

    def run(params, x, tokens):
        return ends.loss(params, x + ends.embed(params, tokens), tokens)

    x = jax.ShapeDtypeStruct((*tokens.shape, training.model.hidden_size), arithmetic.dtype)
    return _piece(run, ends.shapes, x, 1, (1, 1, 1), tokens)


def _arithmetic(dtype: str) -> Arithmetic:
    name: Any = dtype
    return Arithmetic.of(name)


def _piece(run: Callable, params: Any, x, share: int, on: On, *fixed) -> ExpertPiece:
    floats = trained(params)
    sums = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), floats)

    def call(floats, params, x, *fixed):
        return run(with_tables(floats, params), x, *fixed)

    def forward(params, x, *fixed):
        return call(trained(params), params, x, *fixed)

    def pulled(params, x, *fixed):
        return jax.vjp(lambda f, x: call(f, params, x, *fixed), trained(params), x)

    def both(params, sums, x, *fixed):
        y, back = pulled(params, x, *fixed)
        grads, sent = back(jnp.ones_like(y) if y.ndim == 0 else y)
        return jax.tree.map(lambda a, g: a + jnp.asarray(g, a.dtype), sums, grads), sent

    axes = {_AXIS: share} if share > 1 else None
    tiers: Any = {_AXIS: {t: n for t, n in zip(TIERS, on, strict=True) if n > 1}} if axes else None

    def read(fn, *args):
        return trace(fn, *args, axis_sizes=axes, tiers=tiers, at={BATCH: 1.0})

    leaves = jax.tree_util.tree_leaves_with_path(floats)
    held = sum(leaf.size for _, leaf in leaves)
    experts = sum(leaf.size for path, leaf in leaves if of_experts(path))
    residuals: Callable[..., list[Array]] = lambda *a: jax.tree.leaves(pulled(*a)[1])  # noqa: E731
    return ExpertPiece(
        forward=functools.cache(lambda: read(forward, params, x, *fixed)),
        both=functools.cache(lambda: read(both, params, sums, x, *fixed)),
        shared=held - experts,
        experts=experts,
        loads=sum(leaf.size for path, leaf in leaves if is_load(path)),
        kept=kept_bytes(residuals, list((axes or {}).items()), params, x, *fixed),
    )
