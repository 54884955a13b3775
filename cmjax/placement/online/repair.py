"""A better plan within a budget of moves from the plan that is running.

An expert that a rank did not hold before has to be sent to it: one move. The search goes from the
running plan by small steps; every layer's steps give moves against time, and the budget goes where
a move saves most, windows weighed as they count by then (`Risk.slope`). Layers that do not move
keep the running plan's shares per copy; what is returned is never worse than the running plan.
"""

import time

import numpy as np
from jaxtyping import Int

from cmjax.console import Progress
from cmjax.interrupt import Terminated
from cmjax.placement.methods.local_search import improve, start_state
from cmjax.placement.methods.search import search_inputs
from cmjax.placement.plan import EMPTY, Plan, count_copies
from cmjax.placement.pricing import LayerTime, price_s
from cmjax.placement.problem import Problem

_STEPS = 64  # of at most one change of copies and one swap: three moves
_THETA = 0.9  # the slowest ranks first: moves are dear
_CANDIDATES = 128


def repair(
    problem: Problem,
    current: Plan,
    layer_time_s: LayerTime,
    *,
    moves: int,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Improve `current` with at most `moves` experts sent to ranks that did not hold them.

    Experts that only lived on ranks which are now dead, or that an earlier plan did not have, are
    placed first; those moves have to be made and count too. A layer without moves keeps its shares
    per copy; one that moves has even shares, and is compared with the running plan as it is split.

    Args:
      problem: where to place, with all its constraints.
      current: the running plan, same experts and ranks.
      layer_time_s: the priced layer.
      moves: the budget, over all layers.
      seed: of the search.
      seconds: wall-clock limit: no step is begun that would end later, but for the first, which
        compiles.
      progress: as in `search`.
    Returns: the plan; on Ctrl-C what the steps so far allow.
    Raises: ValueError if plan and problem differ in layers, experts or ranks, or the moves that
      have to be made exceed the budget.
    """
    found = (current.layers, current.experts, current.ranks)
    expected = (problem.layers, problem.experts, problem.ranks)
    if found != expected:
        raise ValueError(
            f"repair: the plan has {found[0]} layers of {found[1]} experts on {found[2]} ranks, "
            f"expected {expected[0]} of {expected[1]} on {expected[2]}"
        )
    deadline = np.inf if seconds is None else time.monotonic() + seconds
    parts = problem.dense()
    old = [_fit(current, rows, part, problem.alive) for rows, part in parts]
    first = [_with_all(part, held) for (_, part), held in zip(parts, old, strict=True)]
    trails = [[plan] for plan in first]
    try:
        for index, ((_, part), trail) in enumerate(zip(parts, trails, strict=True)):
            step, slowest, begin = 0, 0.0, time.monotonic()
            for step, plan in enumerate(_trail(part, first[index], seed), 1):
                trail.append(plan)
                now = time.monotonic()
                slowest = max(slowest, now - begin) if step > 1 else 0.0  # the first compiles
                begin = now
                if progress is not None:
                    progress(index * _STEPS + step, len(parts) * _STEPS, "")
                if now + slowest > deadline:
                    break
    except Terminated:
        raise
    except KeyboardInterrupt:
        pass
    shares = [_kept_shares(current, rows, problem.alive, plan) for (rows, _), plan in zip(
        parts, first, strict=True)]  # fmt: skip
    trails = [np.stack(trail) for trail in trails]
    chosen = _spend(problem, parts, old, trails, shares, layer_time_s, moves)
    plans = []
    for (_, part), trail, share, pick in zip(parts, trails, shares, chosen, strict=True):
        plan = part.plan(trail[pick, np.arange(part.layers)])
        if share is not None:
            plan = part.plan(
                plan.expert_of_slot, np.where((pick == 0)[:, None], share, plan.split_of_slot)
            )
        plans.append(plan)
    return problem.assemble(plans)


def count_moves(plan: Plan, current: Plan) -> int:
    """Experts that `plan` has on ranks where `current` does not, over all layers."""
    shapes = ((p.layers, p.ranks, -1) for p in (plan, current))
    new, old = (p.expert_of_slot.reshape(s) for p, s in zip((plan, current), shapes, strict=True))
    return int(_moves(new, old, plan.experts).sum())


def _moves(new, old, experts) -> Int[np.ndarray, "*batch layers"]:
    """Experts new to their ranks, [..., layers, ranks, size] each."""

    def held(plan):
        plan = np.where(plan == EMPTY, experts, plan)
        there = np.zeros((*plan.shape[:-1], experts + 1), bool)
        np.put_along_axis(there, plan, True, axis=-1)
        return there[..., :experts]

    return (held(new) & ~held(old)).sum((-1, -2))


def _fit(current, rows, part, alive) -> Int[np.ndarray, "layers ranks size"]:
    """What of the current plan the usable slots can keep, first slots first."""
    held = current.expert_of_slot.reshape(current.layers, current.ranks, -1)[np.ix_(rows, alive)]
    order = np.argsort(held == EMPTY, axis=-1, kind="stable")
    held = np.take_along_axis(held, order, axis=-1)[..., : part.slots_per_rank]
    room = part.slots_per_rank - held.shape[-1]
    return np.pad(held, ((0, 0), (0, 0), (0, room)), constant_values=EMPTY)


def _kept_shares(current, rows, alive, plan):
    """Shares per slot of `plan`, [layers, slots]: the running plan's in layers that it fills alike,
    even ones elsewhere; None where the running plan has none."""
    if current.split is None:
        return None
    shape = (current.layers, current.ranks, -1)
    held, split = (
        table.reshape(shape)[np.ix_(rows, alive)]
        for table in (current.expert_of_slot, current.split)
    )
    order = np.argsort(held == EMPTY, axis=-1, kind="stable")  # as `_fit` orders them
    held, split = (np.take_along_axis(table, order, axis=-1) for table in (held, split))
    size = plan.shape[1] // len(alive)
    room = ((0, 0), (0, 0), (0, max(0, size - held.shape[-1])))
    held = np.pad(held[..., :size], room, constant_values=EMPTY).reshape(plan.shape)
    split = np.pad(split[..., :size], room).reshape(plan.shape)
    even = Plan(plan, current.experts, len(alive)).split_of_slot
    sums = np.stack([
        np.bincount(row + 1, share, current.experts + 1)[1:]
        for row, share in zip(plan, split, strict=True)
    ])  # fmt: skip
    whole = (held == plan).all(-1) & (np.abs(sums - 1) < 1e-6).all(-1)
    return np.where(whole[:, None], split, even)


def _with_all(part, held) -> Int[np.ndarray, "layers slots"]:
    """Lost experts in empty slots of the lightest ranks, or over the copies missed least."""
    plan = held.reshape(part.layers, -1).copy()
    home = np.arange(plan.shape[1]) // part.slots_per_rank
    loads = part.loads.counts.mean(0)
    for layer, row in enumerate(plan):
        copies = count_copies(row + 1, part.experts + 1)[1:]
        for expert in np.flatnonzero(copies == 0):
            share = np.append(loads[layer] / np.maximum(copies, 1), 0.0)[row]
            empty = row == EMPTY
            tokens = np.bincount(home, share * ~empty, part.ranks)
            spare = np.append(copies, 2)[row] > 1
            missed = np.append(loads[layer] / np.maximum(copies - 1, 1), 0.0)[row]
            score = np.where(empty, tokens[home] - tokens.sum(), missed)
            slot = np.where(spare, score, np.inf).argmin()
            if not empty[slot]:
                copies[row[slot]] -= 1
            row[slot] = expert
            copies[expert] += 1
    return plan


def _trail(part, plan, seed):
    """Plans [layers, slots] after each small step."""
    rng = np.random.default_rng([seed, 2])
    loads, held, cost = search_inputs(part, plan[None])
    route = None if part.routing == "even" else part.route
    state = start_state(held, loads, route=route, cost=cost)
    windows = len(part.loads.counts)
    shape = (1, 2)
    for _ in range(_STEPS):
        state = improve(
            state, loads, np.full(1, _THETA, np.float32), np.zeros(shape, np.float32),
            rng.integers(0, part.slots, (*shape, _CANDIDATES)).astype(np.int32),
            (rng.exponential(size=(*shape, windows, part.ranks)) + 1e-9).astype(np.float32),
            layers=part.layers, swaps=1, tail=part.objective.tail(windows),
            ignore_slower=part.objective.kind == "quantile", route=route,
            keep_empty=part.uneven,
        )  # fmt: skip
        found = np.asarray(state.expert_of_slot).reshape(plan.shape)
        yield np.where(found == part.experts, EMPTY, found)


def _spend(problem, parts, old, trails, shares, layer_time_s, budget):
    """Index into the trail for every layer of every part: where a move saves most, move by move."""
    seconds, moved = [], []
    for number, ((_, part), held, trail) in enumerate(zip(parts, old, trails, strict=True)):
        plans = [part.plan(trail[0], shares[number]), *map(part.plan, trail[1:])]
        seconds.append(np.stack([
            price_s(layer_time_s, plan.tokens_per_rank(part.loads.counts)) for plan in plans
        ]))  # fmt: skip
        moved.append(_moves(trail.reshape(len(trail), *held.shape), held[None], part.experts))
    spent = sum(int(count[0].sum()) for count in moved)
    if spent > budget:
        raise ValueError(
            f"repair: {spent} experts have no rank that holds them and is alive; moves of at least "
            f"{spent} are needed, got {budget}"
        )
    picks = [np.zeros(part.layers, int) for _, part in parts]
    total = sum(part[0].sum(-1) for part in seconds)
    best, least = [pick.copy() for pick in picks], problem.objective(total)
    while True:
        slope, options = problem.objective.slope_at(total), []
        for number, (by_window, count, pick) in enumerate(zip(seconds, moved, picks, strict=True)):
            layers = np.arange(len(pick))
            cost = np.tensordot(slope, by_window, (0, 1))  # [trail, layers]
            gain, more = cost[pick, layers] - cost, count - count[pick, layers]
            can = (more > 0) & (spent + more <= budget) & (gain > 1e-12 * cost)
            rate = np.where(can, gain / np.maximum(more, 1), 0.0)
            at, layer = np.unravel_index(rate.argmax(), rate.shape)
            options.append((rate[at, layer], number, layer, at))
        rate, number, layer, at = max(options)
        if rate <= 0:
            return best
        was, by_window = picks[number][layer], seconds[number]
        total = total + by_window[at, :, layer] - by_window[was, :, layer]
        spent += int(moved[number][at, layer] - moved[number][was, layer])
        picks[number][layer] = at
        if problem.objective(total) < least:
            best, least = [pick.copy() for pick in picks], problem.objective(total)
