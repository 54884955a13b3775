"""Plans from and to files, in cmjax's own format and in those that engines load."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmjax.files import replace_text
from cmjax.inputs import read_json, read_text
from cmjax.placement.files.formats import own, sglang, tensorrt_llm, vllm, vllm_ascend
from cmjax.placement.files.formats.omniplacement import from_omniplacement
from cmjax.placement.plan import Plan

PLAN_FORMATS: Mapping[str, Callable[..., Any]] = {
    "own": own.to_own,
    "sglang": sglang.to_sglang,
    "vllm-ascend": vllm_ascend.to_vllm_ascend,
    "vllm": vllm.to_vllm,
    "tensorrt-llm": tensorrt_llm.to_tensorrt_llm,
}
"""Formats that can be written, by name."""


def write_plan(path: str | Path, plan: Plan, format: str = "own", **layers: Any) -> None:
    """Write a plan; an existing file is replaced only once the new one is complete.

    Args:
      path: of the file.
      plan: the plan.
      format: a name in `PLAN_FORMATS`.
      layers: `model_layers` and `mtp_layers`, as in `plan_text`.
    Raises: ValueError for an unknown format, or a plan that the format cannot hold; OSError if the
      file cannot be written.
    """
    replace_text(path, plan_text(plan, format, **layers))


def plan_text(
    plan: Plan,
    format: str = "own",
    *,
    model_layers: int | None = None,
    mtp_layers: int = 0,
    **beside: Any,
) -> str:
    """A plan as the text of a format, one line per list of slots.

    Args:
      plan: the plan.
      format: a name in `PLAN_FORMATS`.
      model_layers: layers of the model, dense ones included, for formats that go by their numbers
        (default: up to the plan's last).
      mtp_layers: layers of multi-token prediction behind them, which TensorRT-LLM wants rows for.
      beside: more entries of the document, in cmjax's own format only; readers pass over them.
    Raises: ValueError for an unknown format, or a plan that the format cannot hold.
    """
    if format not in PLAN_FORMATS:
        raise ValueError(
            f"unknown plan format {format!r}; known formats: {', '.join(PLAN_FORMATS)}"
        )
    if beside and format != "own":
        raise ValueError(f"plan_text: {format}'s file holds a plan only, not {', '.join(beside)}")
    last = max(plan.layer_labels) + 1 if plan.layer_labels else plan.layers
    last = last if model_layers is None else model_layers
    if format == "tensorrt-llm":
        more = tuple(range(last, last + mtp_layers))
        return tensorrt_llm.yaml_text(tensorrt_llm.to_tensorrt_llm(plan, mtp_layers=more))
    if format == "sglang":
        document = sglang.to_sglang(plan, model_layers=model_layers)
    else:
        document = PLAN_FORMATS[format](plan)
    text = json.dumps(beside | document if beside else document, indent=1)
    flat = re.sub(r"\[\n[-+.\d\se,]*\]", lambda found: " ".join(found[0].split()), text)
    return flat + "\n"


def read_plan(
    path: str | Path,
    *,
    ranks: int | None = None,
    nodes: int | None = None,
    layer_labels: Sequence[int] | None = None,
) -> Plan:
    """Read one plan; see `read_plans`. One of several in an `.npz` is chosen by `file.npz:name`."""
    plans = read_plans(path, ranks=ranks, nodes=nodes, layer_labels=layer_labels)
    if len(plans) > 1:
        listed = ", ".join(list(plans)[:6])
        raise ValueError(
            f"{path}: found {len(plans)} plans ({listed}, ...); choose one by {path}:NAME"
        )
    (plan,) = plans.values()
    return plan


def read_plans(
    path: str | Path,
    *,
    ranks: int | None = None,
    nodes: int | None = None,
    layer_labels: Sequence[int] | None = None,
) -> Mapping[str, Plan]:
    """Read the plans of a file by name, whatever their format: a `.json` of cmjax, SGLang, vLLM or
    vLLM-Ascend (told apart by its keys), a `.yaml` of TensorRT-LLM, or an `.npy` or `.npz` of
    OmniPlacement. A sole plan is named "". A plan of an engine is routed as that engine does.

    Args:
      path: the file, or `file.npz:name`.
      ranks: for SGLang's, vLLM's and TensorRT-LLM's formats, which do not say them; else checked.
      nodes: where the format does not say them (default 1); cmjax's own does.
      layer_labels: for SGLang's format, the model's layers to keep; dense ones have rows too.
    Raises: ValueError of one line: the file, what was found, what is expected.
    """
    chosen = re.fullmatch(r"(.+\.npz):([^/\\]+)", str(path), re.IGNORECASE)
    file, name = (Path(chosen[1]), chosen[2]) if chosen else (Path(path), None)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"{path}: expected a plan, found {found}")
    suffix = file.suffix.lower()
    if suffix in (".npy", ".npz"):
        plans = from_omniplacement(file, nodes=nodes or 1)
        if name is not None:
            if name not in plans:
                raise ValueError(f"{file}: found no plan {name!r} among {', '.join(plans)}")
            plans = {"": plans[name]}
    elif suffix == ".json":
        plans = {"": _from_json(file, ranks, nodes, layer_labels)}
    elif suffix in (".yaml", ".yml"):
        plans = {"": _from_yaml(file, ranks, nodes)}
    else:
        raise ValueError(
            f"{path}: expected a plan as .yaml or as .json, .npy or .npz, found "
            f"{file.suffix or 'no suffix'!r}"
        )
    for plan in plans.values():
        if ranks is not None and plan.ranks != ranks:
            raise ValueError(f"{plan.source}: the plan is for {plan.ranks} ranks, not {ranks}")
    return plans


def _from_json(file, ranks, nodes, layer_labels):
    source = str(file)
    document = read_json(file)
    if isinstance(document, Mapping):
        if document.get("format") == own.PLAN_FORMAT:
            return own.from_own(document, source)
        if sglang.KEY in document:
            return sglang.from_sglang(
                document, source,
                ranks=_needed(ranks, source, "SGLang"), nodes=nodes or 1,
                layer_labels=layer_labels,
            )  # fmt: skip
        if any(key in document for key in vllm_ascend.KEYS):
            return vllm_ascend.from_vllm_ascend(document, source, nodes=nodes or 1)
    if isinstance(document, list) and document and isinstance(document[0], list):
        return vllm.from_vllm(
            document, source, ranks=_needed(ranks, source, "vLLM"), nodes=nodes or 1
        )
    found = f"the keys {', '.join(document)}" if isinstance(document, Mapping) else "no object"
    raise ValueError(
        f"{source}: unknown plan format; expected format {own.PLAN_FORMAT!r} (cmjax), {sglang.KEY} "
        f"(SGLang), {vllm_ascend.KEYS[1]} (vLLM-Ascend) or a list of lists (vLLM), found {found}"
    )


def _from_yaml(file, ranks, nodes):
    source = str(file)
    document = tensorrt_llm.read_yaml(read_text(file), source)
    if not isinstance(document, Mapping) or tensorrt_llm.KEY not in document:
        raise ValueError(
            f"{source}: unknown plan format; expected {tensorrt_llm.KEY} (TensorRT-LLM)"
        )
    return tensorrt_llm.from_tensorrt_llm(
        document, source, ranks=_needed(ranks, source, "TensorRT-LLM"), nodes=nodes or 1
    )


def _needed(ranks, source, engine):
    if ranks is None:
        raise ValueError(f"{source}: {engine}'s format does not say the ranks; give them")
    return ranks
