"""The blocks of a model step that people think in, rolled up from its nested scopes."""

from collections.abc import Mapping

from cmjax.cost.timeline import WAITING

BLOCKS = {
    "attention": "attention",
    "router": "router",
    "dispatch": "dispatch",
    "experts": "experts",
    "combine": "combine",
    "shared": "shared expert",
    "dense_ffn": "dense FFN",
    "tensor_parallel": "tensor parallelism",
    WAITING: WAITING,
    "lm_head": "LM head",
    "sample": "sampling",
    "mtp": "MTP",
    "embed": "embedding",
    "other": "other",
}
"""Top-level blocks in the order of the step, and what people call them."""


_BETWEEN = "tensor_parallel"
"""The block that lies inside others: what moves between the ranks that share a request."""


def block_of(scope: str) -> str:
    """The block that a scope path such as `attention/output/QuantMatmul` belongs to."""
    parts = scope.split("/")
    if _BETWEEN in parts:
        return _BETWEEN
    top = next((part for part in parts if not part.startswith("microbatch")), "")
    return top if top in BLOCKS else "other"


def roll_up(breakdown: Mapping[str, float]) -> dict[str, float]:
    """Sum a breakdown by scope path into blocks, in the order of the step; zeros are left out."""
    totals = dict.fromkeys(BLOCKS, 0.0)
    for scope, value in breakdown.items():
        totals[block_of(scope)] += value
    return {block: total for block, total in totals.items() if total > 0}
