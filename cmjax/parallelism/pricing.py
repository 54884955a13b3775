"""How long a step takes under a plan: its pieces' timelines, put together by the schedule.

    step = pipeline(f, b, send) + reduction of gradients that is not hidden + optimizer

Every term is the price of a traced `Program`. Pieces are priced for all micro-batches and places
of a search at once (`vmap`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from cmjax.cost import price
from cmjax.cost.host import on_host
from cmjax.hardware import Supernode, relative_slopes, replace_leaf
from cmjax.models.dense import DenseConfig, Recompute, TensorSplit
from cmjax.parallelism import pieces
from cmjax.parallelism.eager import CORE_HBM, Eager, of_core, of_exchange, only
from cmjax.parallelism.layerwise import Counts
from cmjax.parallelism.links import (
    GROUPS,
    On,
    on_any_links,
    plan_layout,
    reach,
    share_names,
    share_sizes,
    shares,
)
from cmjax.parallelism.memory import PARAMETER_BYTES, split_of, stage_parameters
from cmjax.parallelism.plan import Optimizer, Plan
from cmjax.parallelism.schedules import StageTimes, pipeline_s
from cmjax.parallelism.traffic import copied, exchanged
from cmjax.program import Operation, Program

Groups = tuple[tuple[str, On], ...]
"""Where the groups of `links.GROUPS` lie."""
_GATHERS = {(False, False): 8, (False, True): 10, (True, False): 10, (True, True): 13}
"""All-gathers' worth of bytes that a layer sends, by sequence parallelism and full recomputation;
an all-reduce is two."""
_PASSES = ("both", "inputs")
"""Programs of a piece: all of it, and what a zero-bubble schedule does first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step and what they are made of.

    Fields:
      pipeline: all micro-batches through all stages. busy: of it, what the slowest stage works.
      reduction: gradients (and gathered parameters) over the replicas, as far as it is waited for.
      optimizer: the update. tied: gradients of what several ranks hold copies of, added up: words
        of the two ends, and norms of ranks that share the sequence.
    """

    pipeline: float
    busy: float
    reduction: float
    optimizer: float
    tied: float

    @property
    def step_s(self) -> float:
        return self.pipeline + self.reduction + self.optimizer + self.tied


class LinkPrices:
    """Seconds of programs, collectives and the optimizer's update on a machine; each is priced
    once."""

    def __init__(self, machine: Supernode):
        self.machine = machine
        self._sent: dict[tuple, float] = {}

    def run(self, program: Program, size: str, value: float) -> float:
        """Of a program of that one size."""
        key = (program, value)
        if key not in self._sent:
            self._sent[key] = _time(program, self.machine, {size: value})
        return self._sent[key]

    def update(self, parameters: float) -> float:
        """Of the optimizer on that many elements of a rank."""
        return self.run(pieces.optimizer_update(), "parameters", parameters)

    def collective(self, kind: str, elements: float, on: On) -> float:
        """Of a rank's 2-byte elements, over a group that lies on these tiers; `kind` as
        `pieces.reduction` has it."""
        if on == (1, 1, 1) or elements == 0:
            return 0.0
        key = (kind, elements, on)
        if key not in self._sent:
            self._sent[key] = self._priced(kind, elements, on)
        return self._sent[key]

    def _priced(self, kind: str, elements: float, on: On) -> float:
        part = shares(on, self.machine)
        if kind == "send":  # to a neighbour, on the furthest links that any of them uses
            part = tuple(1.0 if tier == reach(on) else 0.0 for tier in range(3))
            elements = elements / 2  # `on_any_links` takes a peer for one of two ranks
        program = _far(pieces.reduction(kind), (("tensor", (2, reach(on))),))
        sizes = {"elements": elements, **dict(zip(share_names("tensor"), part, strict=True))}
        return _time(program, self.machine, sizes)


class Prices(LinkPrices):
    """Seconds of pieces on a machine; each is priced once.

    Args:
      model, machine: what is trained, where.
      micro_batches: all that will be asked for, so that a piece is priced for them together.
      eager: the framework, where it is PyTorch's.
    """

    def __init__(
        self,
        model: DenseConfig,
        machine: Supernode,
        micro_batches: tuple[int, ...],
        *,
        eager: Eager | None = None,
    ):
        super().__init__(machine)
        self.model, self.eager = model, eager
        self.batches = tuple(sorted(set(micro_batches)))
        self._known: dict[tuple, dict[int, float]] = {}
        self._layouts: dict[tuple, dict[str, On]] = {}

    def step(self, plan: Plan, global_batch: int) -> StepTime:
        """Seconds of a step under a plan that divides (`Plan.check`)."""
        model, on = self.model, self._on(plan)
        split, b, m = split_of(plan), plan.micro_batch, plan.micro_batches(global_batch)
        counts, groups = plan.counts(model.layers), _groups(on)
        stages = _of_stages(counts, functools.partial(self.stage_s, plan))
        slowest, total = functools.reduce(_larger, stages), sum(stages)
        weights = 0.0
        for mode in plan.modes if plan.schedule == "zero_bubble" else ():
            if number := plan.interleave * sum(each.by_mode.get(mode, 0) for each in counts):
                weights += number * self._weights_s(plan, mode)
        layer = pieces.layer(model, split, "none")
        send = self._send(plan, float(layer.passed.evaluate({pieces.BATCH: float(b)})) / 2, on)
        times = StageTimes(slowest=slowest, total=total, weights=weights, send=send)
        pipeline = pipeline_s(plan.schedule, times, m, plan.pipeline, plan.interleave)

        numbers = [each.layers for each in counts]
        unlike = {0, plan.pipeline - 1, numbers.index(max(numbers))}
        held = float(max(stage_parameters(model, plan, s, numbers[s]) for s in unlike))
        forward = self._piece(layer, "forward", groups)[b]
        backward = slowest - plan.interleave * max(numbers) * forward
        times = max(exchanged(model, plan, m, stage) for stage in unlike) / held
        reduction = self._reduction(plan, held, times, on["data"], m, slowest, backward)
        shards = 1 if plan.optimizer == "none" else plan.data
        update = self.update(held / shards)
        tied = 0.0
        if model.tied and plan.pipeline > 1:
            words = model.vocab / plan.tensor * model.hidden / shards
            tied = self.collective("all_reduce", words, pair(on["pipeline"]))
        tied += self.collective("all_reduce", copied(model, plan) / plan.pipeline, on["tensor"])
        return StepTime(
            pipeline=pipeline, busy=m * slowest, reduction=reduction, optimizer=update, tied=tied
        )

    def stage_s(self, plan: Plan, stage: int, counts: Counts) -> Any:
        """Seconds of a micro-batch on a stage whose chunks recompute `counts` of their layers;
        `plan.recompute` is not read. An array where counts are."""
        model, split, b = self.model, split_of(plan), plan.micro_batch
        on = _groups(self._on(plan))

        def seconds(piece: pieces.Piece, part: str = "both") -> float:
            return self._piece(piece, part, on)[b]

        def of_layer(mode: Recompute) -> float:
            if self.eager is None:
                return seconds(pieces.layer(model, split, mode))
            whole = pieces.layer(model, split, "none")
            again = seconds(whole, "forward") if mode == "full" else 0.0
            piece = whole if mode == "full" else pieces.layer(model, split, mode)
            sent = [self._piece(one, part, on, of_exchange)[b]
                    for one, part in ((piece, "both"), (whole, "forward"))]  # fmt: skip
            hidden = self.eager.hidden_s(model, plan, self.machine, sent[0] - sent[1])
            return again + seconds(piece) - hidden

        used = counts.by_mode
        each = {mode: of_layer(mode) for mode in used}
        taken = plan.interleave * sum(number * each[mode] for mode, number in used.items())
        if stage == 0:
            taken = taken + seconds(pieces.embedding(model, split))
        if stage == plan.pipeline - 1:
            for mode, here in counts.last.items():
                # The query layer is in the output, and a layer all the same.
                end = seconds(pieces.output(model, split, mode))
                taken = taken + here * (end - model.query_layer * each[mode])
        return taken

    def _weights_s(self, plan: Plan, mode: Recompute) -> Any:
        """Seconds of the gradients of a layer's weights."""
        piece, on = pieces.layer(self.model, split_of(plan), mode), _groups(self._on(plan))
        both, inputs = (self._piece(piece, part, on)[plan.micro_batch] for part in _PASSES)
        return _larger(0.0, both - inputs)

    def waited_at_least(self, plan: Plan) -> float:
        """Of the seconds of stages but the slowest, what a step waits for; of zero_bubble, at least
        that, whatever is recomputed."""
        if plan.schedule != "zero_bubble":
            return 1 / plan.interleave
        # At most: not split evenly, after gathering the layer's inputs again, in 20 kernels.
        most, b, ranks = 0.0, plan.micro_batch, plan.tensor * plan.context
        for mode in plan.modes:
            layer = pieces.layer(self.model, TensorSplit(), mode)
            both, inputs = (self._piece(layer, part)[b] for part in _PASSES)
            weights = 1.1 * (both - inputs) / ranks
            gathers = 2 * self._stream_bytes(plan) * plan.sequence_parallel
            weights += self._wire_s(gathers, self._on(plan)["tensor"])
            weights += 20 * float(self.machine.chip.matrix_startup_s)
            most = max(most, weights / self._layer_at_least_s(plan, mode))
        return max(0.0, 1 - 2 * most)

    def at_least_s(
        self,
        plan: Plan,
        global_batch: int,
        optimizers: Sequence[Optimizer] | None = None,
        *,
        divided: bool = True,
    ) -> float:
        """A lower bound of a step's seconds, for which only one rank's pieces are traced: they are
        split evenly at best, and what is sent takes as long as its bytes. `optimizers` are what the
        plan's may be, by default the one it has. Not `divided`, wherever its stages begin."""
        model, t, p, b = self.model, plan.tensor, plan.pipeline, plan.micro_batch
        m, ranks, on = plan.micro_batches(global_batch), t * plan.context, self._on(plan)
        counts, stream = plan.counts(model.layers), self._stream_bytes(plan)
        stages = _of_stages(counts, functools.partial(self.stage_at_least_s, plan))
        slowest, total, most = max(stages), sum(stages), max(each.layers for each in counts)
        if not divided:
            layer_s = plan.interleave * self._layer_at_least_s(plan, "none")
            most, last = -(-model.layers // (p * plan.interleave)), counts[-1].layers
            slowest = max(total / p, most * layer_s, stages[-1] - (last - 1) * layer_s)
        idle = (total - slowest) * self.waited_at_least(plan)
        send = self._furthest_s(stream / t, on["pipeline"])
        sends = 2 * (m * plan.interleave + p - 1) * send
        held = PARAMETER_BYTES * model.layers * model.layer_parameters / (t * p)
        whole_s = self._wire_s(2 * held, on["data"])
        gathered = m * (1.5 - 0.5 * model.query_layer / model.layers)
        layer = pieces.layer(model, TensorSplit(), "none")
        forward = self._piece(layer, "forward")[b] / ranks
        backward = slowest - plan.interleave * most * forward
        rounds = {"zero2": ((m + 1) / 2, m * backward), "zero3": (gathered, m * slowest)}
        reduction = max(0.0, min(
            times * whole_s - hidden * plan.overlap
            for times, hidden in (
                rounds.get(each, (1.0, backward)) for each in optimizers or (plan.optimizer,)
            )
        ))  # fmt: skip
        return float((m * slowest + idle + sends + reduction) * 0.98)

    def stage_at_least_s(self, plan: Plan, stage: int, counts: Counts) -> Any:
        """A lower bound of a stage's seconds; as `stage_s`."""
        one, b = TensorSplit(), plan.micro_batch
        used = counts.by_mode
        taken = plan.interleave * sum(
            number * self._layer_at_least_s(plan, mode) for mode, number in used.items()
        )
        if stage == plan.pipeline - 1:
            for mode, here in counts.last.items():
                end = self._piece(pieces.output(self.model, one, mode), "both")[b]
                if self.model.query_layer:
                    end -= self._piece(pieces.layer(self.model, one, mode), "both")[b]
                taken = taken + here * end / (plan.tensor * plan.context)
        return taken

    def _layer_at_least_s(self, plan: Plan, mode: Recompute) -> float:
        model, b = self.model, plan.micro_batch
        on = self._on(plan)["tensor"]
        layer = pieces.layer(model, TensorSplit(), mode)
        gathers = _GATHERS[plan.sequence_parallel, mode == "full"]
        least = self._piece(layer, "both")[b] / (plan.tensor * plan.context)
        return least + self._wire_s(gathers * self._stream_bytes(plan), on)

    def _stream_bytes(self, plan: Plan) -> float:
        """Of a micro-batch between layers."""
        tokens = plan.micro_batch * self.model.sequence / plan.context
        return PARAMETER_BYTES * tokens * self.model.hidden

    def _on(self, plan: Plan) -> dict[str, On]:
        """Ranks of every dimension by tier."""
        key = plan.order, plan.context, *(getattr(plan, name) for name in plan.order)
        if key not in self._layouts:
            self._layouts[key] = plan_layout(plan, self.machine)
        return self._layouts[key]

    def _wire_s(self, nbytes: float, on: On) -> float:
        """At least what an all-gather of that many bytes takes."""
        part = shares(on, self.machine)
        return max(nbytes * share / rate for share, rate in zip(part, self._rates, strict=True))

    def _furthest_s(self, nbytes: float, on: On) -> float:
        return nbytes / self._rates[reach(on)] if max(on) > 1 else 0.0

    @functools.cached_property
    def _rates(self) -> tuple[float, ...]:
        """Bytes a second of every tier, at best."""
        fabric, exchange = self.machine.fabric, self.machine.exchange
        best = max(float(exchange.bandwidth), float(exchange.bandwidth_from_hbm))
        tiers = fabric.die, fabric.node, fabric.supernode
        return tuple(float(tier.bandwidth_bytes_per_s) * best for tier in tiers)

    def _reduction(self, plan: Plan, held, times, on: On, m: int, micro_s, backward_s) -> float:
        """Exposed seconds of what replicas tell one another, `times` an all-reduce of what a rank
        holds (`traffic.exchanged`)."""
        whole = self.collective("all_reduce", held, on)
        every = m * (backward_s if plan.optimizer == "zero2" else micro_s)
        hidden = every if plan.optimizer in ("zero2", "zero3") else backward_s
        return _larger(0.0, times * whole - (hidden if plan.overlap else 0.0))

    def _piece(
        self,
        piece: pieces.Piece,
        part: str,
        on: Groups = (),
        keep: Callable[[Operation], bool] | None = None,
    ) -> dict[int, float]:
        """Seconds by micro-batch, of some operations or of all."""
        key = (piece, part, on, keep)
        if key not in self._known:
            program = piece.programs[part]()
            groups = {name: (n, reach(dict(on)[name])) for name, n in piece.groups.items()}
            program = _far(program, tuple(groups.items()))
            sizes = {pieces.BATCH: np.array(self.batches, float)}
            sizes |= share_sizes(groups, dict(on), self.machine)
            found = _times(only(program, keep) if keep else program, self.machine, sizes)
            if self.eager and keep is None:
                core = only(program, of_core)
                slow = replace_leaf(self.machine, "efficiency.hbm", CORE_HBM)
                found += _times(core, slow, sizes) - _times(core, self.machine, sizes)
            self._known[key] = dict(zip(self.batches, map(_number, found), strict=True))
        return self._known[key]

    def _send(self, plan: Plan, elements: float, on: Mapping[str, On]) -> float:
        """Seconds from one stage to the next. Ranks of a tensor-parallel group hold the same: each
        sends its part to its own peer, and they gather it there (arXiv 2104.04473, section 4.1)."""
        if plan.pipeline == 1 or plan.tensor == 1 or plan.sequence_parallel:
            return self.collective("send", elements, on["pipeline"])
        part = elements / plan.tensor
        sent = self.collective("send", part, on["pipeline"])
        return sent + self.collective("all_gather", elements / 2, on["tensor"])  # of two traced


def _groups(on: Mapping[str, On]) -> Groups:
    return tuple((name, on[name]) for name in GROUPS)


def _of_stages(counts: list[Counts], seconds: Callable[[int, Counts], Any]) -> list:
    """Seconds of every stage; those between the ends take as long where they recompute alike."""
    inner = {each: seconds(1, each) for each in set(counts[1:-1])}
    stages = range(len(counts))
    return [
        inner[each] if stage in stages[1:-1] else seconds(stage, each)
        for stage, each in zip(stages, counts, strict=True)
    ]


def _number(x) -> Any:
    """A float, but of what JAX traces."""
    return x if isinstance(x, Tracer) else float(x)


def _larger(a, b) -> Any:
    """The larger of two numbers, which JAX may trace."""
    return jnp.maximum(a, b) if isinstance(a, Tracer) or isinstance(b, Tracer) else max(a, b)


def elasticities(
    model: DenseConfig, machine: Supernode, plan: Plan, global_batch: int
) -> dict[str, float]:
    """By how many per cent a step changes per per cent of every constant of the machine, strongest
    first; those that it does not feel are left out. One gradient gives them all.

    Args: a plan that divides the model and the batch (`Plan.check`).

    >>> from cmjax.hardware import load_machine
    >>> from cmjax.models.dense import preset
    >>> found = elasticities(
    ...     preset("pangu-2.6b"), load_machine("ascend910-2048"), Plan(data=64, tensor=8), 512
    ... )
    >>> f"{found['fabric.die.bandwidth_bytes_per_s']:.2f}"  # links in a server
    '-0.31'
    """

    @on_host
    def slopes(machine):
        return jax.value_and_grad(
            lambda machine: Prices(model, machine, (plan.micro_batch,))
            .step(plan, global_batch).step_s
        )(machine)  # fmt: skip

    return relative_slopes(machine, *slopes(machine))


def pair(on: On) -> On:
    """Two ranks at the ends of a group."""
    return tuple(2 if tier == reach(on) else 1 for tier in range(3))  # type: ignore[return-value]


def _needed(program: Program, sizes: Mapping) -> dict:
    return {name: size for name, size in sizes.items() if name in program.symbols}


@functools.lru_cache(maxsize=1024)
def _far(program: Program, groups: tuple[tuple[str, tuple[int, int]], ...]) -> Program:
    return on_any_links(program, dict(groups)) if groups else program


@functools.lru_cache(maxsize=1024)
def _pricer(program: Program, batched: bool) -> Callable:
    def one(machine, sizes):
        return price(program, machine, sizes).total_s

    def many(machine, batch, sizes):
        return jax.vmap(lambda b: one(machine, {**sizes, pieces.BATCH: b}))(batch)

    return on_host(many if batched else one)


def _time(program: Program, machine: Supernode, sizes: Mapping[str, float]) -> Any:
    """Of one run of a program, at those of the sizes that it has; a float, unless JAX traces it."""
    return _number(_pricer(program, False)(machine, _needed(program, sizes)))


def _times(program: Program, machine: Supernode, sizes: Mapping):
    batch, sizes = sizes[pieces.BATCH], _needed(program, sizes)
    if pieces.BATCH not in sizes:
        return np.full(len(batch), _time(program, machine, sizes))
    del sizes[pieces.BATCH]
    return _pricer(program, True)(machine, batch, sizes)
