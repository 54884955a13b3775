"""SGLang's `--init-expert-location` file.

    {"physical_to_logical_map": [[expert of slot 0, expert of slot 1, ...], ...]}

Read from SGLang 0.5.6, `srt/eplb/expert_location.py`:

  * The object's entries are passed on as keyword arguments, so it must hold this key and no other;
    `--init-expert-location FILE` takes a path that ends in `.json`.
  * One row per layer of the model, indexed by the model's layer number, dense layers included
    (`num_layers` is the model's `num_hidden_layers`). Rows of dense layers are never used; they are
    written as SGLang's trivial placement, slot s holding expert s mod experts.
  * Every row has experts + `--ep-num-redundant-experts` slots, a multiple of `--ep-size`; slot s
    lives on rank s // (slots / ep_size). The file does not say the ranks.
  * Where a rank, or failing that its node, holds a copy itself, SGLang sends it all of its own
    tokens for that expert; only tokens without a near copy are spread over all: the routing
    `nearest-copy`, by which plans of this format are judged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cmjax.placement.files.formats.own import check_only_slots, table
from cmjax.placement.plan import Plan

KEY = "physical_to_logical_map"


def to_sglang(plan: Plan, *, model_layers: int | None = None) -> dict[str, Any]:
    """The plan as a JSON document.

    Args:
      plan: has layer labels, no empty slots and an even split.
      model_layers: the model's layers, dense ones included (default: the last label + 1).
    Raises: ValueError if the plan says more or less than the format can.
    """
    if plan.layer_labels is None:
        raise ValueError(
            f"{plan.source}: SGLang's rows are the model's layers, dense ones included, and this "
            f"plan does not number its layers; number them (first layer 3 for DeepSeek-V3)"
        )
    check_only_slots(plan, "SGLang's format")
    last = max(plan.layer_labels)
    if model_layers is not None and model_layers <= last:
        raise ValueError(
            f"{plan.source}: expected more than {last} model layers, got {model_layers}"
        )
    trivial = np.arange(plan.slots) % plan.experts
    rows = np.tile(trivial, (last + 1 if model_layers is None else model_layers, 1))
    rows[list(plan.layer_labels)] = plan.expert_of_slot
    return {KEY: rows.tolist()}


def from_sglang(
    document: Mapping[str, Any],
    source: str,
    *,
    ranks: int,
    nodes: int = 1,
    layer_labels: Sequence[int] | None = None,
) -> Plan:
    """Read a document back.

    Args:
      document: the JSON object.
      source: for messages.
      ranks, nodes: which the file does not say.
      layer_labels: the model's layers to keep (default: all rows, dense layers' among them).
    Raises: ValueError, one line that starts with `source`, for anything else.
    """
    if set(document) != {KEY}:
        raise ValueError(
            f"{source}: SGLang expects the key {KEY} and no other, found {', '.join(document)}"
        )
    experts = table(document[KEY], KEY, source)
    if experts.dtype.kind not in "iu" or experts.size == 0:
        raise ValueError(f"{source}: expected whole expert numbers in {KEY}")
    labels = tuple(range(len(experts)) if layer_labels is None else layer_labels)
    beyond = [label for label in labels if not 0 <= label < len(experts)]
    if beyond:
        raise ValueError(f"{source}: found no row for layer {beyond[0]} among {len(experts)}")
    if experts.min() < 0:
        raise ValueError(f"{source}: expected expert numbers of 0 or more, found {experts.min()}")
    count = int(experts.max()) + 1
    return Plan(
        experts[list(labels)], count, ranks, nodes, labels,
        source=source, routing="nearest-copy",
    )  # fmt: skip
