"""cmjax's own plan format: everything a `Plan` holds, as one JSON object.

    {"format": "cmjax-placement", "version": 1, "experts": 256, "ranks": 64, "nodes": 4,
     "slots_per_rank": 5, "routing": "even", "layer_labels": [3, ...], "provenance": {...},
     "expert_of_slot": [[...], ...], "split_of_slot": [[...], ...]}

`layer_labels`, `split_of_slot` and `provenance` are left out where nothing is known; other keys are
ignored, so that results may be stored beside a plan. -1 is an empty slot.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cmjax.inputs import shown
from cmjax.placement.plan import EMPTY, Plan
from cmjax.placement.routing import ROUTINGS

PLAN_FORMAT = "cmjax-placement"
PLAN_VERSION = 1


def to_own(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON document."""
    document: dict[str, Any] = {
        "format": PLAN_FORMAT,
        "version": PLAN_VERSION,
        "experts": plan.experts,
        "ranks": plan.ranks,
        "nodes": plan.nodes,
        "slots_per_rank": plan.slots_per_rank,
        "routing": plan.routing,
    }
    if plan.layer_labels is not None:
        document["layer_labels"] = list(plan.layer_labels)
    if plan.provenance:
        document["provenance"] = dict(plan.provenance)
    document["expert_of_slot"] = plan.expert_of_slot.tolist()
    if plan.split is not None:
        document["split_of_slot"] = plan.split.tolist()
    return document


def from_own(document: Mapping[str, Any], source: str) -> Plan:
    """Read a document back.

    Raises: ValueError, one line that starts with `source`, for anything else.
    """
    if document.get("format") != PLAN_FORMAT:
        raise ValueError(
            f"{source}: expected format {PLAN_FORMAT!r}, found {document.get('format')!r}"
        )
    if document.get("version") != PLAN_VERSION:
        raise ValueError(
            f"{source}: expected version {PLAN_VERSION}, found {document.get('version')!r}"
        )
    missing = [k for k in ("experts", "ranks", "nodes", "expert_of_slot") if k not in document]
    if missing:
        raise ValueError(f"{source}: the plan lacks {', '.join(missing)}")
    for name in ("experts", "ranks", "nodes"):
        if type(document[name]) is not int:
            raise ValueError(f"{source}: expected a whole number {name}, found {document[name]!r}")
    labels, provenance = document.get("layer_labels"), document.get("provenance", {})
    if not isinstance(labels, list | None) or not isinstance(provenance, Mapping):
        raise ValueError(f"{source}: expected layer_labels as a list and provenance as an object")
    split, routing = document.get("split_of_slot"), document.get("routing", "even")
    if routing not in ROUTINGS:
        raise ValueError(
            f"{source}: expected routing as one of {', '.join(ROUTINGS)}, found {routing!r}"
        )
    return Plan(
        table(document["expert_of_slot"], "expert_of_slot", source),
        document["experts"],
        document["ranks"],
        document["nodes"],
        None if labels is None else tuple(labels),
        None if split is None else table(split, "split_of_slot", source),
        provenance,
        source,
        routing,
    )


def check_only_slots(plan: Plan, form: str) -> None:
    """Refuse a plan that says more than which expert a slot holds, which is all that `form` can.

    Raises: ValueError: the plan has empty slots, or shares per slot.
    """
    if plan.split is not None or (plan.expert_of_slot == EMPTY).any():
        raise ValueError(f"{plan.source}: {form} holds neither empty slots nor shares per slot")


def table(rows: Any, name: str, source: str) -> np.ndarray:
    """A list of equally long lists of numbers as an array.

    Raises: ValueError, one line, naming the first row that differs.
    """
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{source}: expected {name} as a list of lists")
    odd = next((n for n, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if odd is not None:
        raise ValueError(
            f"{source}: layers disagree: {name} has {len(rows[0])} entries in layer 0 and "
            f"{len(rows[odd])} in layer {odd}"
        )
    for n, row in enumerate(rows):
        wrong = next((x for x in row if type(x) not in (int, float)), None)
        if wrong is not None:
            raise ValueError(
                f"{source}: expected numbers in {name}, found {shown(wrong)} in layer {n}"
            )
    try:
        return np.array(rows)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{source}: expected numbers in {name}: {error}") from None
