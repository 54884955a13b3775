"""Shared experts in slots: every token goes to them, so they are experts with a known load."""

from dataclasses import replace

import numpy as np

from cmjax.placement.loads import Loads


def with_shared(loads: Loads, shared: int, top_k: int) -> Loads:
    """Loads with `shared` more experts, numbered after the routed ones, that get every token.

    A placement then decides how many replicas they have and where, as for any expert: at
    CloudMatrix-Infer's EP320, 256 routed experts of top 8 and a shared one in 320 slots, an even
    share gives it 32 or more.

    Args:
      loads: routed loads, `top_k` assignments per token.
      shared: shared experts that live in slots, 0 or more.
      top_k: routed experts per token, 1 or more.
    Raises: ValueError for other numbers.
    """
    if shared < 0 or top_k < 1:
        raise ValueError(f"with_shared: expected 0 or more shared and top_k of 1 or more, got "
                         f"{shared} and {top_k}")  # fmt: skip
    tokens = loads.counts.sum(-1, keepdims=True) / top_k
    counts = np.concatenate([loads.counts, np.repeat(tokens, shared, axis=-1)], axis=-1)
    return replace(loads, counts=counts)
