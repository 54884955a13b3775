"""The layers of a plan that a recording counts, matched by number or by position."""

from cmjax.placement.loads import Loads
from cmjax.placement.plan import Plan


def align(plan: Plan, loads: Loads) -> tuple[Plan, Loads]:
    """The layers of `loads` in both: a recording may hold some of a plan's layers only.

    Raises: ValueError of one line if layers or experts do not match.
    """
    if plan.experts != loads.experts:
        raise ValueError(
            f"{plan.source}: the plan places {plan.experts} experts per layer, "
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
