"""vLLM-Ascend's expert map, which it takes as `expert_map_path` in its EPLB configuration.

    {"moe_layer_count": L,
     "layer_list": [{"layer_id": l, "device_count": R,
                     "device_list": [{"device_id": r, "device_expert": [expert, ...]}, ...]}, ...]}

Read from vLLM-Ascend 0.23.0, which reads it in `eplb/core/eplb_utils.py` and writes it, as
`expert_map_record_path`, in `eplb/adaptor/vllm_adaptor.py`:

  * `layer_id` counts MoE layers from 0; layers and devices are taken by position. Keys that are not
    named above are not looked at: the model's own layer number is kept in `model_layer`.
  * All devices of a layer hold equally many experts; older releases read all layers into one array
    and so need it of the whole file.
  * A device addresses one copy of an expert. A second copy on the same device would be dead weight
    and shift the slot numbers of the devices after it, so such plans are refused
    (`once_per_rank` mends them).
  * A rank sends all its tokens of an expert to one copy, chosen by rank number modulo the copies:
    the routing `rank-modulo`, by which plans of this format are judged. Maps that mix in shared
    experts number them from `experts` on; here they count as experts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cmjax.placement.files.formats.own import check_only_slots, table
from cmjax.placement.plan import Plan

KEYS = ("moe_layer_count", "layer_list")


def to_vllm_ascend(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON document.

    Raises: ValueError if the plan says more than the format can, or a rank holds an expert twice.
    """
    check_only_slots(plan, "vLLM-Ascend's format")
    by_rank = plan.expert_of_slot.reshape(plan.layers, plan.ranks, -1)
    ordered = np.sort(by_rank, axis=-1)
    twice = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
    if len(twice):
        layer, rank, place = twice[0]
        raise ValueError(
            f"{plan.source}: vLLM-Ascend addresses one copy of an expert per rank; rank {rank} "
            f"holds expert {ordered[layer, rank, place]} of layer {layer} twice"
        )
    layers = []
    for layer, ranks in enumerate(by_rank.tolist()):
        devices = [{"device_id": r, "device_expert": held} for r, held in enumerate(ranks)]
        record = {"layer_id": layer, "device_count": plan.ranks, "device_list": devices}
        if plan.layer_labels is not None:
            record["model_layer"] = plan.layer_labels[layer]
        layers.append(record)
    return {"moe_layer_count": plan.layers, "layer_list": layers}


def from_vllm_ascend(document: Mapping[str, Any], source: str, *, nodes: int = 1) -> Plan:
    """Read a document back; `nodes` is what the file does not say.

    Raises: ValueError, one line that starts with `source`, for anything else.
    """
    layers = document.get("layer_list")
    if not isinstance(layers, list) or document.get("moe_layer_count") != len(layers) or not layers:
        raise ValueError(
            f"{source}: expected a layer_list of moe_layer_count layers, found "
            f"{document.get('moe_layer_count')!r} and "
            f"{len(layers) if isinstance(layers, list) else type(layers).__name__}"
        )
    rows = [_experts(record, f"{source}: layer {n}", n) for n, record in enumerate(layers)]
    ranks = len(layers[0]["device_list"])
    for n, record in enumerate(layers):
        if len(record["device_list"]) != ranks:
            raise ValueError(
                f"{source}: layers disagree: layer 0 has {ranks} devices and layer {n} "
                f"{len(record['device_list'])}"
            )
    experts = table(rows, "device_expert", source)
    if experts.dtype.kind not in "iu" or experts.size == 0 or experts.min() < 0:
        raise ValueError(f"{source}: expected whole expert numbers of 0 or more in device_expert")
    labels = [record.get("model_layer") for record in layers]
    named = None if None in labels else tuple(labels)
    return Plan(
        experts, int(experts.max()) + 1, ranks, nodes, named,
        source=source, routing="rank-modulo",
    )  # fmt: skip


def _experts(record, where, position):
    """The experts of one layer's record, devices in order."""
    try:
        devices = record["device_list"]
        held = [device["device_expert"] for device in devices]
        ids = [device["device_id"] for device in devices]
        stated = (record["layer_id"], record["device_count"])
        sizes = {len(experts) for experts in held}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: expected layer_id, device_count and a device_list of device_id and "
            f"device_expert: {type(error).__name__} {error}"
        ) from None
    if stated != (position, len(devices)) or ids != list(range(len(devices))):
        raise ValueError(
            f"{where}: expected layer_id {position} and device_count {len(devices)} devices in "
            f"order, found layer_id {stated[0]}, device_count {stated[1]}, devices {ids[:4]}..."
        )
    if len(sizes) != 1:
        raise ValueError(
            f"{where}: expected equally many experts on every device, found "
            f"{' and '.join(map(str, sorted(sizes)))}"
        )
    return [expert for experts in held for expert in experts]
