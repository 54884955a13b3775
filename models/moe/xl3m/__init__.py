"""XL3M: any of these models on texts far longer than its window, segment by segment."""

from cmjax.models.moe.xl3m.context import (
    KeyContext,
    NextLogits,
    XL3MConfig,
    best_segments,
    chosen_context,
    entropy,
    key_context,
    score_segments,
    segment_starts,
    select,
)
from cmjax.models.moe.xl3m.scorer import Scorer, next_logits

__all__ = [
    "KeyContext",
    "NextLogits",
    "Scorer",
    "XL3MConfig",
    "best_segments",
    "chosen_context",
    "entropy",
    "key_context",
    "next_logits",
    "score_segments",
    "segment_starts",
    "select",
]
