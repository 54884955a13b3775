"""Judging a placement from a file on given loads, whatever its layers and slots are like."""

from collections.abc import Callable

import numpy as np

from cmjax.placement.judging.evaluate import Evaluation, evaluate
from cmjax.placement.loads import Loads
from cmjax.placement.plan import Plan
from cmjax.placement.pricing import LayerTime


def judge(plan: Plan, loads: Loads, price_of: Callable[[int], LayerTime]) -> Evaluation:
    """`evaluate` for a plan that may fill more slots in one layer than in another.

    Layers are matched by number where both sides have numbers, else by position. Each layer is
    priced, and bounded, with the slots it has. The bound holds for uneven splits too: of an
    expert's copies, one serves at least its even share.

    Args:
      plan: the placement.
      loads: in the unit that the price expects (see `Loads.scaled`).
      price_of: `price_of(slots_per_rank)` is the layer's price with so many slots on every rank.
    Raises: ValueError of one line if layers or experts do not match.
    """
    plan, loads = align(plan, loads)
    depths = plan.filled.max(-1)
    par = np.empty(loads.counts.shape[:2])
    time_s, bound_s = np.zeros(len(par)), np.zeros(len(par))
    for depth in np.unique(depths):
        rows = np.flatnonzero(depths == depth)
        served = Loads(loads.counts[:, rows], loads.source)
        found = evaluate(plan.select(rows.tolist()), served, price_of(int(depth)))
        par[:, rows] = found.par
        time_s += found.time_s
        bound_s += found.lower_bound_s
    return Evaluation(par=par, time_s=time_s, lower_bound_s=bound_s)


def align(plan: Plan, loads: Loads) -> tuple[Plan, Loads]:
    """The layers of `loads` in both: a recording may hold some of a plan's layers only.

    Raises: ValueError of one line if layers or experts do not match.
    """
    if plan.expert_count != loads.experts:
        raise ValueError(
            f"{plan.source}: the plan places {plan.expert_count} experts per layer, "
            f"{loads.source} counts {loads.experts}"
        )
    if plan.layer_labels is not None and loads.layer_labels is not None:
        row = {label: n for n, label in enumerate(plan.layer_labels)}
        missing = [label for label in loads.layer_labels if label not in row]
        if missing:
            raise ValueError(
                f"{plan.source}: layers disagree: the plan has no layer {missing[0]} of "
                f"{loads.source}; it has {_described(plan.layer_labels, plan.layers)}"
            )
        return plan.select([row[label] for label in loads.layer_labels]), loads
    if plan.layers != loads.layers:
        raise ValueError(
            f"{plan.source}: layers disagree: the plan has "
            f"{_described(plan.layer_labels, plan.layers)}, {loads.source} has "
            f"{_described(loads.layer_labels, loads.layers)}; equal numbers of layers, or layer "
            f"numbers on both sides (--first-layer gives LOADS theirs), can be matched"
        )
    return plan, loads


def _described(labels, layers):
    if labels is None:
        return f"{layers} layers without numbers"
    shown = ", ".join(map(str, labels[:4])) + (f", ... {labels[-1]}" if layers > 4 else "")
    return f"{layers} layers ({shown})"
