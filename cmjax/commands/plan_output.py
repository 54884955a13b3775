"""What `cmjax place` writes of its plans: files that engines load, and the page people read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cmjax import placement, report
from cmjax.cost.ranks import mesh_spread
from cmjax.deploy.moe_step import build_layer
from cmjax.hardware import Supernode


def numbered(loads: placement.Loads, first_layer: int | None) -> placement.Loads:
    """`loads` with their layers numbered from `first_layer`, unless the recording numbers them."""
    if first_layer is None or loads.layer_labels is not None:
        return loads
    labels = tuple(range(first_layer, first_layer + loads.layers))
    return dataclasses.replace(loads, layer_labels=labels)


def check_outputs(
    format: str, html: Path | None, loads: placement.Loads, *, full: bool = True
) -> None:
    """Before long work: can a plan for these loads be written in this format, and the page?

    Args:
      format: of the plan.
      html: the page, if any.
      loads: what is placed.
      full: whether every slot will be filled, and every expert split evenly.
    Raises: ValueError of one line, saying what is missing.
    """
    if format != "own" and not full:
        raise ValueError(
            f"--format {format} holds neither empty slots nor shares per slot: do without "
            f"--without-ranks, --memory-gib and --weighted"
        )
    if html is not None and html.suffix.lower() != ".html":
        raise ValueError(f"{html}: pages are written as .html, got {html.suffix or 'no suffix'}")
    if format == "sglang" and loads.layer_labels is None:
        raise ValueError(
            f"{loads.source}: SGLang's file numbers layers as the model does, dense ones "
            f"included; give --first-layer (3 for DeepSeek-V3)"
        )


def plan_document(
    plan: placement.Plan,
    loads: placement.Loads,
    format: str,
    *,
    provenance: Mapping[str, Any],
    console: Console | None,
    **beside: Any,
) -> str:
    """A plan as the text of a file.

    What a format cannot hold is changed, and what that costs under `loads` is said on `console`:
    vLLM-Ascend addresses one copy of an expert per rank. `provenance`, and what stands `beside` the
    plan, are kept in cmjax's own format only.
    """
    if format == "vllm-ascend":
        plan = _once_per_rank(plan, loads, console)
    plan = dataclasses.replace(plan, provenance=provenance)
    return placement.plan_text(plan, format, **(beside if format == "own" else {}))


def write_page(
    path: Path,
    *,
    source: str,
    loads: placement.Loads,
    tokens: Mapping[str, np.ndarray],
    scores: Mapping[str, placement.Evaluation],
    machine: Supernode,
    model: str,
    nodes: int | None,
    reach: Mapping[str, placement.Reach] | None = None,
    served: Mapping[str, placement.Evaluation] | None = None,
) -> None:
    """Write the page of some plans for one workload.

    Args:
      path: ends in .html.
      source: where the loads are from.
      loads: scaled to a step.
      tokens: of the last window, by plan, layer and rank.
      scores: by plan.
      machine, model: what the layer was priced for.
      nodes: nodes the ranks are spread over (default: as few as hold them).
      reach: by plan, where routes are known.
      served: scores by plan on loads not planned for, if judged there.
    Raises: ValueError if `path` cannot be written.
    """
    ranks = next(iter(tokens.values())).shape[-1]
    redundant = -loads.experts % ranks
    layer = build_layer(
        model, machine, ranks=ranks, nodes=nodes, experts=loads.experts, redundant=redundant
    )
    hidden = layer.args[-1].shape[-1]  # the block's input, [ranks, tokens, hidden]
    report.PlacementPage(
        title=f"Where {loads.experts} experts live on {ranks} dies",
        setting=(
            f"Loads: {source}, {loads.layers} layers. Price: the MoE layers of {model} on "
            f"{machine.name}, {loads.counts[-1, 0].sum():,.0f} token copies a layer and step. "
            f"Time is the mean over windows; the pictures show the last window."
        ),
        loads=loads.counts[-1],
        tokens=tokens,
        scores=scores,
        nodes=nodes or mesh_spread(ranks, machine).nodes,
        row_bytes=3 * hidden,  # one byte a value to dispatch (INT8), two to combine (BF16)
        reach=reach,
        served=served,
    ).write(path)


def reach_of(
    path: str, domain: str | None, plans: Mapping[str, placement.Plan], nodes: int
) -> dict[str, placement.Reach] | None:
    """Ranks and nodes a token goes to under each plan; None where `path` holds counts only."""
    experts = next(iter(plans.values())).expert_count
    try:
        routes = placement.read_routes(path, experts=experts, domain=domain)
    except ValueError:
        return None
    return {
        name: placement.reach(dataclasses.replace(plan, nodes=nodes), routes)
        for name, plan in plans.items()
    }


def score_of(found: placement.Evaluation) -> dict[str, float]:
    """An evaluation as numbers of a JSON file."""
    return {
        "mean_par": found.mean_par,
        "worst_par": found.worst_par,
        "balancedness": found.balancedness,
        "time_ms": found.mean_time_s * 1e3,
        "gap_to_bound": found.gap,
    }


def judged_score(found: placement.Judged) -> dict[str, float]:
    """A judged plan as numbers of a JSON file."""
    score = score_of(found.made_for) | {
        "objective_ms": found.objective_s * 1e3,
        "objective_gap_to_bound": found.gap,
        "solve_s": found.solve_s,
    }
    if found.served is not None:
        score |= {
            "test_time_ms": found.served.mean_time_s * 1e3,
            "test_mean_par": found.served.mean_par,
        }
    if found.step_par is not None:
        score["step_par"] = float(found.step_par.mean())
    if found.reach is not None:
        score |= {
            "ranks_per_token": float(found.reach.ranks.mean()),
            "nodes_per_token": float(found.reach.nodes.mean()),
        }
    return score


def _once_per_rank(plan, loads, console):
    """The plan with no expert twice on a rank; says what that costs."""
    found = placement.once_per_rank(plan, loads)
    changed = int((found.experts != plan.experts).sum())
    if changed and console is not None:
        par = [
            float((tokens.max(-1) / tokens.mean(-1)).mean())
            for tokens in (p.tokens_per_rank(loads.counts) for p in (plan, found))
        ]
        console.print(
            f"vLLM-Ascend addresses one copy of an expert per rank: {changed} slots changed, "
            f"mean PAR {par[0]:.4f} -> {par[1]:.4f}"
        )
    return found
