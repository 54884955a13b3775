"""The search: every plan that divides and fits, priced; the fastest first.

It is exhaustive over its space. Three things keep it small: what is recomputed, layer by layer,
and where stages begin are not tried but solved for (`fastest_stages`); of plans that differ only in
what cannot make a step faster one is taken (GPipe never beats 1F1B); and it goes best first. A plan
waits in a queue by a lower bound of its step, of its layers alone and then with as little
recomputed as fits; it is priced when its turn comes, and the search ends when the bound of the next
one is slower than the last of the best (A*, Hart, Nilsson and Raphael 1968).
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterator

from cmjax.hardware import Supernode
from cmjax.models.dense import DenseConfig
from cmjax.parallelism.eager import Eager
from cmjax.parallelism.links import plan_layout
from cmjax.parallelism.memory import USABLE, fits, memory_of
from cmjax.parallelism.plan import DIMENSIONS, Optimizer, Plan, Schedule
from cmjax.parallelism.pricing import Prices
from cmjax.parallelism.recomputation import fastest_stages
from cmjax.parallelism.result import GIB, PricedPlan, priced

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
CHUNKS = (2, 3, 4, 6, 8)
LONG = 8192
"""Tokens of a sequence from which on a search shares sequences among replicas."""
OPTIMIZERS: tuple[Optimizer, ...] = ("none", "zero1", "zero2", "zero3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: plans, fastest first; how many divide, and how many of those were found
    to fit and priced (the others are too slow whatever they need, or fit nowhere)."""

    plans: tuple[PricedPlan, ...]
    considered: int
    feasible: int


def price_plan(model: DenseConfig, machine: Supernode, plan: Plan, global_batch: int) -> PricedPlan:
    """One plan, priced.

    Raises: ValueError: degrees that do not divide, more devices than the machine has, or a plan
      that does not fit, with how much is missing and what would help.
    """
    plan.check(model, global_batch)
    check_devices(plan.devices, machine)
    memory = memory_of(model, plan, global_batch)
    if not fits(memory, machine):
        raise ValueError(f"plan: {too_large(memory.peak, machine)}; {_advice(model, plan)}")
    return price_anyway(model, machine, plan, global_batch)


def price_anyway(
    model: DenseConfig,
    machine: Supernode,
    plan: Plan,
    global_batch: int,
    *,
    eager: Eager | None = None,
) -> PricedPlan:
    """One plan that divides, priced whether it fits or not; `eager` as `Prices` takes it."""
    time = Prices(model, machine, (plan.micro_batch,), eager=eager).step(plan, global_batch)
    memory, peak = memory_of(model, plan, global_batch), float(machine.chip.cube_flops_16bit)
    return priced(model, plan, global_batch, time, memory, peak)


def search(
    model: DenseConfig,
    machine: Supernode,
    devices: int,
    global_batch: int,
    *,
    top: int = 5,
    overlap: bool = True,
) -> Found:
    """The fastest plans for a number of devices.

    Args:
      model, machine: what is trained, where.
      devices: how many of the machine's are used; all of them by every plan.
      global_batch: sequences of a step.
      top: plans to return.
      overlap: whether gradients may be reduced during the backward pass.
    Raises: ValueError: no plan divides, or none fits; the message says by how much.
    """
    check_devices(devices, machine)
    prices = Prices(model, machine, MICRO_BATCHES)
    peak_flops = float(machine.chip.cube_flops_16bit)
    usable = USABLE * float(machine.chip.hbm_bytes)
    plans = [
        placed
        for plan in _candidates(model, devices, global_batch, overlap)
        for placed in _orders(plan, machine)
    ]
    if not plans:
        raise ValueError(
            f"no plan divides {devices} devices, {model.layers} layers, {model.heads} heads and a "
            f"global batch of {global_batch}; try {_friendly(devices)} devices, or a global batch "
            "that their data-parallel replicas divide"
        )
    queue = [
        (prices.at_least_s(plan, global_batch, _optimizers(plan), divided=False), i)
        for i, plan in enumerate(plans)
    ]
    heapq.heapify(queue)
    feasible, found = 0, list[PricedPlan]()
    solved: dict[int, list[_Option]] = {}
    least: tuple[float, Plan] | None = None
    while queue:
        bound, i = heapq.heappop(queue)
        slowest = found[-1].step_s if len(found) == top else math.inf
        if bound > slowest:
            break  # the rest is slower, and as many plans that fit are known
        if i not in solved:
            solved[i] = _options(prices, plans[i], global_batch, usable)
            if solved[i]:
                heapq.heappush(queue, (min(option.bound for option in solved[i]), i))
            elif not found:
                last = _optimizers(plans[i])[-1]
                lean = dataclasses.replace(plans[i], recompute="full", optimizer=last)
                peak = memory_of(model, lean, global_batch).peak
                least = min(least or (peak, lean), (peak, lean), key=lambda pair: pair[0])
            continue
        feasible += 1
        options = (option for option in solved[i] if option.bound <= slowest)
        fitting = [plan for option in options for plan in option.best()]
        found.append(min(
            (
                priced(
                    model, plan, global_batch, prices.step(plan, global_batch),
                    memory_of(model, plan, global_batch), peak_flops,
                )
                for plan in fitting
            ),
            key=lambda plan: plan.step_s,
        ))  # fmt: skip
        found.sort(key=lambda plan: plan.step_s)
        del found[top:]
    if not found:
        assert least is not None, "what does not fit was weighed"
        raise ValueError(fits_nowhere(devices, machine, *least))
    return Found(plans=tuple(found), considered=len(plans), feasible=feasible)


@dataclasses.dataclass(frozen=True)
class _Option:
    """A plan with its optimizer spread in one way, that fits: a lower bound of its seconds, and the
    plan itself, with as little recomputed as fits and its fastest boundaries, which may be some."""

    bound: float
    best: Callable[[], list[Plan]]


def _options(prices: Prices, plan: Plan, global_batch: int, usable: float) -> list[_Option]:
    """The ways to spread a plan's optimizer with which it fits."""
    found = []
    for optimizer in _optimizers(plan):
        option = dataclasses.replace(plan, optimizer=optimizer)
        choose = functools.partial(
            fastest_stages, prices.model, option, global_batch, usable,
            at_least=functools.partial(prices.stage_at_least_s, plan),
            waited=prices.waited_at_least(plan),
        )  # fmt: skip
        if likely := choose():
            bound = min(prices.at_least_s(each, global_batch) for each in likely)
            best = functools.partial(choose, functools.partial(prices.stage_s, plan))
            found.append(_Option(bound, best))  # as many choices fit
    return found


def _optimizers(plan: Plan) -> tuple[Optimizer, ...]:
    return OPTIMIZERS if plan.data > 1 else OPTIMIZERS[:1]


def check_devices(devices: int, machine: Supernode) -> None:
    """Raises: ValueError: fewer than one device, or more than the machine has."""
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    if devices > machine.ranks:
        raise ValueError(f"{devices} devices are asked for; {machine.name} has {machine.ranks}")


def too_large(peak: float, machine: Supernode) -> str:
    """What is missing, in words."""
    usable = USABLE * float(machine.chip.hbm_bytes)
    return (
        f"a device needs {peak / GIB:.1f} GiB and has {usable / GIB:.1f} to use "
        f"({(peak - usable) / GIB:.1f} GiB are missing)"
    )


def fits_nowhere(devices: int, machine: Supernode, peak: float, leanest: Plan) -> str:
    """That no plan fits, in words: `peak` bytes are the least that one needs."""
    return (
        f"the model fits nowhere on {devices} devices: {too_large(peak, machine)} with the "
        f"leanest plan ({leanest}); more devices, a smaller global batch or a device with more "
        "memory would help"
    )


def _candidates(
    model: DenseConfig, devices: int, global_batch: int, overlap: bool
) -> Iterator[Plan]:
    for tensor in _divisors(devices):
        for pipeline in _divisors(devices // tensor):
            data = devices // tensor // pipeline
            if pipeline > model.layers:
                continue
            options = itertools.product(_parts(model, data), (False, True), _schedules(pipeline))
            for (micro_batch, context), sequence, (schedule, chunks) in options:
                if global_batch % (data // context) or (sequence and tensor == 1):
                    continue
                plan = Plan(
                    data=data, tensor=tensor, pipeline=pipeline, micro_batch=micro_batch,
                    recompute="none", sequence_parallel=sequence, schedule=schedule,
                    interleave=chunks, overlap=overlap and data > 1, context=context,
                )  # fmt: skip
                if _divides(plan, model, global_batch):
                    yield plan


def _parts(model: DenseConfig, data: int) -> Iterator[tuple[int, int]]:
    """Micro-batches, and replicas that share their sequences: half the sequences on half as many
    ranks each are as many tokens, without an exchange, so only single ones are shared."""
    yield from ((micro_batch, 1) for micro_batch in MICRO_BATCHES)
    if model.sequence >= LONG:
        yield from ((1, context) for context in _divisors(data)[1:])


def _schedules(pipeline: int) -> list[tuple[Schedule, int]]:
    if pipeline == 1:
        return [("1f1b", 1)]
    return [("1f1b", 1), ("zero_bubble", 1), *(("interleaved", chunks) for chunks in CHUNKS)]


def _divides(plan: Plan, model: DenseConfig, global_batch: int) -> bool:
    try:
        plan.check(model, global_batch)
    except ValueError:
        return False
    return True


def _orders(plan: Plan, machine: Supernode) -> list[Plan]:
    """The plan with every order of the dimensions that lies differently on the machine."""
    seen = {}
    for order in itertools.permutations(DIMENSIONS):
        option = dataclasses.replace(plan, order=order)
        placed = plan_layout(option, machine)
        seen.setdefault(tuple(placed[name] for name in sorted(placed)), option)
    return list(seen.values())


def _advice(model: DenseConfig, plan: Plan) -> str:
    ideas = []
    if plan.recompute != "full":
        ideas.append("recompute=full")
    if plan.data > 1 and plan.optimizer != "zero3":
        ideas.append("optimizer=zero1" if plan.optimizer == "none" else "optimizer=zero3")
    if plan.micro_batch > 1:
        ideas.append("a smaller micro_batch")
    if plan.tensor > 1 and not plan.sequence_parallel:
        ideas.append("sequence_parallel=true")
    ideas.append("a larger tensor or pipeline degree")
    return f"{' or '.join(ideas)} would help"


def _friendly(devices: int) -> int:
    """The largest power of two of at most that many."""
    return 1 << (devices.bit_length() - 1)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
