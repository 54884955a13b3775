"""Shared experts in slots."""

import numpy as np
import pytest

from cmjax.placement import (
    Loads,
    Problem,
    greedy,
)
from cmjax.placement.shared import with_shared


def test_a_shared_expert_gets_the_replicas_that_its_tokens_need():
    # EP320 of CloudMatrix-Infer: 256 routed experts of top 8 in even use, one shared, 320 slots.
    loads = with_shared(Loads(np.full((1, 256), 8.0)), 1, top_k=8)
    plan = greedy(Problem(loads, 320, 63))
    assert plan.experts == 257 and plan.copies[0, 256] >= 32
    with pytest.raises(ValueError, match="top_k of 1 or more"):
        with_shared(loads, 1, top_k=0)
