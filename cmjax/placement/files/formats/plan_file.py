"""Plans from and to files, in cmjax's own format and in those that engines load."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmjax.files import replace_text
from cmjax.placement.files.formats import own, sglang, vllm_ascend
from cmjax.placement.files.formats.omniplacement import from_omniplacement
from cmjax.placement.plan import Plan

PLAN_FORMATS: Mapping[str, Callable[[Plan], dict[str, Any]]] = {
    "own": own.to_own,
    "sglang": sglang.to_sglang,
    "vllm-ascend": vllm_ascend.to_vllm_ascend,
}
"""Formats that can be written, by name."""


def write_plan(path: str | Path, plan: Plan, format: str = "own") -> None:
    """Write a plan; an existing file is replaced only once the new one is complete.

    Raises: ValueError for an unknown format, or a plan that the format cannot hold; OSError if the
      file cannot be written.
    """
    replace_text(path, plan_text(plan, format))


def plan_text(plan: Plan, format: str = "own", **beside: Any) -> str:
    """A plan as the JSON text of a format, one line per list of slots.

    Args:
      plan: the plan.
      format: a name in `PLAN_FORMATS`.
      beside: more entries of the document, in cmjax's own format only; readers pass over them.
    Raises: ValueError for an unknown format, or a plan that the format cannot hold.
    """
    if format not in PLAN_FORMATS:
        raise ValueError(
            f"unknown plan format {format!r}; known formats: {', '.join(PLAN_FORMATS)}"
        )
    if beside and format != "own":
        raise ValueError(f"plan_text: {format}'s file holds a plan only, not {', '.join(beside)}")
    text = json.dumps(beside | PLAN_FORMATS[format](plan), indent=1)
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
    """Read the plans of a file by name, whatever their format: a `.json` of cmjax, SGLang or
    vLLM-Ascend (told apart by its keys), or an `.npy` or `.npz` of OmniPlacement. A sole plan is
    named "".

    Args:
      path: the file, or `file.npz:name`.
      ranks: for SGLang's format, which does not say them; else checked.
      nodes: where the format does not say them (default 1); cmjax's own does.
      layer_labels: for SGLang's format, the model's layers to keep; dense ones have rows too.
    Raises: ValueError of one line: the file, what was found, what is expected.
    """
    chosen = re.fullmatch(r"(.+\.npz):([^/\\]+)", str(path), re.IGNORECASE)
    file, name = (Path(chosen[1]), chosen[2]) if chosen else (Path(path), None)
    if not file.is_file():
        raise ValueError(f"{path}: expected a plan, found no such file")
    suffix = file.suffix.lower()
    if suffix in (".npy", ".npz"):
        plans = from_omniplacement(file, nodes=nodes or 1)
        if name is not None:
            if name not in plans:
                raise ValueError(f"{file}: found no plan {name!r} among {', '.join(plans)}")
            plans = {"": plans[name]}
    elif suffix == ".json":
        plans = {"": _from_json(file, ranks, nodes, layer_labels)}
    else:
        raise ValueError(
            f"{path}: expected a plan as .json, .npy or .npz, found {file.suffix or 'no suffix'!r}"
        )
    for plan in plans.values():
        if ranks is not None and plan.ranks != ranks:
            raise ValueError(f"{plan.source}: the plan is for {plan.ranks} ranks, not {ranks}")
    return plans


def _from_json(file, ranks, nodes, layer_labels):
    source = str(file)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: expected a plan as JSON, found: {error}") from None
    if isinstance(document, Mapping):
        if document.get("format") == own.PLAN_FORMAT:
            return own.from_own(document, source)
        if sglang.KEY in document:
            if ranks is None:
                raise ValueError(f"{source}: SGLang's format does not say the ranks; give them")
            return sglang.from_sglang(
                document, source, ranks=ranks, nodes=nodes or 1, layer_labels=layer_labels
            )
        if any(key in document for key in vllm_ascend.KEYS):
            return vllm_ascend.from_vllm_ascend(document, source, nodes=nodes or 1)
    found = f"the keys {', '.join(document)}" if isinstance(document, Mapping) else "no object"
    raise ValueError(
        f"{source}: unknown plan format; expected format {own.PLAN_FORMAT!r} (cmjax), {sglang.KEY} "
        f"(SGLang) or {vllm_ascend.KEYS[1]} (vLLM-Ascend), found {found}"
    )
