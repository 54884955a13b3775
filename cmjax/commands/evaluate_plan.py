"""`cmjax place --evaluate`: how good an existing plan is on given loads."""

import dataclasses
from functools import cache, partial

import numpy as np
from jaxtyping import Float

from cmjax import placement
from cmjax.deploy.layer_price import row_time
from cmjax.deploy.moe_step import build_layer
from cmjax.hardware import Supernode


@dataclasses.dataclass(frozen=True, eq=False)
class Rating:
    """How good a plan is on loads, and the tokens it puts on ranks in their last window."""

    score: placement.Evaluation
    loads: placement.Loads
    tokens: Float[np.ndarray, "layers ranks"]


def evaluate_plans(
    path: str,
    loads: dict[str, placement.Loads],
    *,
    machine: Supernode,
    model: str,
    tokens: int,
    ranks: int | None = None,
    nodes: int | None = None,
) -> dict[str, Rating]:
    """Judge the plan, or the plans, of a file on each workload.

    Args:
      path: a plan file of any known format; see `placement.read_plans`.
      loads: workloads by name.
      machine, model, tokens: what the MoE layer is priced for; tokens are per rank and step.
      ranks, nodes: where the file does not say them.
    Returns: what was found by plan and workload. A sole plan of as many slots in every layer is
      joined by greedy and contiguous ones of its size, planned on the same loads.
    Raises: ValueError of one line for a file that is no plan, or a plan that is not for the loads.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    plans = placement.read_plans(path, ranks=ranks, nodes=nodes)
    judged = {}
    for name, plan in plans.items():
        on_nodes = plan.nodes if plan.nodes > 1 else nodes
        layer = (machine, model, plan.ranks, on_nodes, plan.expert_count)
        price_of = partial(_price, tokens, *layer)
        copies = _layer(*layer, int(plan.filled.max())).copies
        for workload, counted in loads.items():
            served = counted.scaled(float(tokens) * plan.ranks * copies)
            title = " on ".join(part for part in (name or "plan", workload) if part)
            part, _ = placement.align(plan, served)
            judged[title] = Rating(
                placement.judge(plan, served, price_of),
                served,
                part.tokens_per_rank(served.counts[-1]),
            )
            if len(plans) == 1 and (plan.filled == plan.slots_per_rank).all():
                judged |= _baselines(plan, served, price_of(plan.slots_per_rank), workload)
    return judged


@cache
def _layer(machine, model, ranks, nodes, experts, depth):
    """The MoE block with `depth` slots on every rank."""
    return build_layer(
        model, machine, ranks=ranks, nodes=nodes, experts=experts,
        redundant=depth * ranks - experts,
    )  # fmt: skip


@cache
def _price(tokens, machine, *layer):
    return row_time(_layer(machine, *layer), machine, tokens=tokens)


def _baselines(plan, served, price, workload):
    plan, served = placement.align(plan, served)
    redundant = plan.slots - plan.expert_count
    problem = placement.Problem(served, plan.ranks, redundant, plan.nodes)
    judged = {}
    for method in ("greedy", "contiguous"):
        made = placement.place(problem, method, price)
        judged[f"{method} on {workload}" if workload else method] = Rating(
            placement.evaluate(made, served, price), served, made.tokens_per_rank(served.counts[-1])
        )
    return judged
