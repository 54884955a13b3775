"""TensorRT-LLM's load balancer configuration, which its MoE configuration takes as `load_balancer`.

    num_slots: 288
    initial_global_assignments:
      3: [expert of slot 0, expert of slot 1, ...]
      4: [...]
    layer_updates_per_iter: 0

Every MoE layer has a row under the model's own layer number, layers of multi-token prediction
too: these follow the model's last layer. A row has `num_slots` experts; slot s lives on rank
s // (num_slots / ranks). The file does not say the ranks. `layer_updates_per_iter` of 0 keeps the
placement; more moves experts while it serves. Tokens take copies in turn: an even split.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from cmjax.inputs import in_one_line
from cmjax.placement.files.formats.own import check_only_slots, table
from cmjax.placement.plan import Plan

KEY = "initial_global_assignments"


def to_tensorrt_llm(plan: Plan, *, mtp_layers: tuple[int, ...] = ()) -> dict[str, Any]:
    """The plan as a document.

    Args:
      plan: has layer labels, no empty slots and an even split.
      mtp_layers: numbers of more layers, which get the trivial row: slot s holds expert s mod
        experts.
    Raises: ValueError if the plan says more or less than the format can.
    """
    if plan.layer_labels is None:
        raise ValueError(
            f"{plan.source}: TensorRT-LLM's rows go by the model's layer numbers, and this plan "
            f"does not number its layers; number them (first layer 3 for DeepSeek-V3)"
        )
    check_only_slots(plan, "TensorRT-LLM's format")
    rows = dict(zip(plan.layer_labels, plan.expert_of_slot.tolist(), strict=True))
    trivial = (np.arange(plan.slots) % plan.experts).tolist()
    rows |= {layer: trivial for layer in mtp_layers if layer not in rows}
    return {
        "num_slots": plan.slots,
        KEY: dict(sorted(rows.items())),
        "layer_updates_per_iter": 0,
    }


def yaml_text(document: Mapping[str, Any]) -> str:
    """The document as YAML, one line per layer."""
    return yaml.safe_dump(document, default_flow_style=None, sort_keys=False, width=10**9)


def read_yaml(text: str, source: str) -> Any:
    """What YAML holds.

    Raises: ValueError, one line that starts with `source`, for text that is no YAML.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = in_one_line(error)
        raise ValueError(f"{source}: expected a plan as YAML, found: {said}") from None


def from_tensorrt_llm(
    document: Mapping[str, Any], source: str, *, ranks: int, nodes: int = 1
) -> Plan:
    """Read a document back.

    Args:
      document: the YAML mapping.
      source: for messages.
      ranks, nodes: which the file does not say.
    Raises: ValueError, one line that starts with `source`, for anything else.
    """
    rows, slots = document.get(KEY), document.get("num_slots")
    if not isinstance(rows, Mapping) or not rows or not all(type(n) is int for n in rows):
        raise ValueError(
            f"{source}: expected {KEY} as a mapping of layer numbers to expert numbers, found "
            f"{type(rows).__name__}"
        )
    labels = tuple(sorted(rows))
    experts = table([rows[label] for label in labels], KEY, source)
    if experts.dtype.kind not in "iu" or experts.size == 0 or experts.min() < 0:
        raise ValueError(f"{source}: expected whole expert numbers of 0 or more in {KEY}")
    if slots != experts.shape[1]:
        raise ValueError(
            f"{source}: expected num_slots {experts.shape[1]}, as many as a row has, found {slots}"
        )
    return Plan(experts, int(experts.max()) + 1, ranks, nodes, labels, source=source)
