"""Dead ranks are taken out before any method sees the problem; many ranks work."""

import numpy as np
import pytest

from cmjax.placement import (
    Loads,
    Problem,
    evaluate,
    example_family,
    place,
)
from cmjax.placement.plan import EMPTY
from tests.placement.layer_time import slowest


@pytest.mark.parametrize("method", ["search", "greedy", "one-spare", "contiguous", "random"])
def test_dead_ranks_hold_nothing_and_the_rest_serve_everything(family, method):
    family = Loads(family.counts, layer_labels=(3, 4, 9))
    problem = Problem(family, 8, 16, nodes=2, without_ranks=(1, 6))
    plan = place(problem, method, slowest)
    experts = plan.expert_of_slot.reshape(3, 8, -1)
    assert (experts[:, [1, 6]] == EMPTY).all()
    tokens = plan.tokens_per_rank(family.counts)
    assert (tokens[..., [1, 6]] == 0).all()
    np.testing.assert_allclose(tokens.sum(-1), family.counts.sum(-1))
    found = evaluate(plan, family, slowest)
    np.testing.assert_allclose(found.par, tokens.max(-1) / (tokens.sum(-1) / 6))
    assert found.gap >= -1e-9 and plan.layer_labels == (3, 4, 9)


def test_768_ranks_work():
    loads = Loads(example_family(workloads=1, layers=1).counts)
    plan = place(Problem(loads, 768, 512), "greedy", slowest)
    assert evaluate(plan, loads, slowest).gap < 0.3
