"""vLLM's own expert map: a JSON list, per MoE layer a list of the expert of every physical slot.

    [[expert of slot 0, expert of slot 1, ...], ...]

Rows are the MoE layers from the first, without dense ones; slot s lives on rank
s // (slots / ranks). The file says neither the ranks nor the model's layer numbers. Tokens take the
copies of their expert in turn: an even split.
"""

from typing import Any

import numpy as np

from cmjax.placement.files.formats.own import check_only_slots, table
from cmjax.placement.plan import Plan


def to_vllm(plan: Plan) -> list[list[int]]:
    """The plan as a JSON document.

    Raises: ValueError if the plan says more than the format can.
    """
    check_only_slots(plan, "vLLM's map")
    return plan.expert_of_slot.tolist()


def from_vllm(document: Any, source: str, *, ranks: int, nodes: int = 1) -> Plan:
    """Read a document back; `ranks` and `nodes` are what the file does not say.

    Raises: ValueError, one line that starts with `source`, for anything else.
    """
    experts = table(document, "the map", source)
    if experts.ndim != 2 or experts.dtype.kind not in "iu" or not experts.size or experts.min() < 0:
        raise ValueError(f"{source}: expected whole expert numbers of 0 or more, a list per layer")
    return Plan(np.asarray(experts), int(experts.max()) + 1, ranks, nodes, source=source)
