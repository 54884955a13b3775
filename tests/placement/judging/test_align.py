"""Plans from files are judged layer by layer, with the slots and shares they have."""

import numpy as np
import pytest

from cmjax.placement import Loads, Plan, Problem, evaluate, evaluate_by_depth, greedy


def price_of(slots_per_rank):
    return lambda tokens: 1e-6 * slots_per_rank + 1e-8 * tokens.max(-1)


def test_a_full_even_plan_is_judged_as_evaluate_does():
    loads = Loads(np.random.default_rng(0).random((3, 4, 12)) + 0.1)
    plan = greedy(Problem(loads, 4, 4))
    found = evaluate_by_depth(plan, loads, price_of)
    expected = evaluate(plan, loads, price_of(4))
    for name in ("par", "time_s", "lower_bound_s"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-14)


def test_empty_slots_serve_nothing_and_cost_nothing():
    # Layer 0 fills one slot a rank, layer 1 two; the hot expert has a copy in layer 1 only.
    plan = Plan(np.array([[0, -1, 1, -1], [0, 1, 0, -1]]), 2, 2)
    found = evaluate_by_depth(plan, Loads(np.array([[30.0, 10], [30, 10]])), price_of)
    np.testing.assert_allclose(found.par, [[30 / 20, 25 / 20]])
    np.testing.assert_allclose(found.time_s, 1e-6 + 30e-8 + 2e-6 + 25e-8)
    assert found.gap > 0


def test_shares_say_who_serves_what():
    split = np.array([[0.25, 1.0, 0.75, 0.0]])
    plan = Plan(np.array([[0, 1, 0, -1]]), 2, 2, split=split)
    np.testing.assert_allclose(plan.tokens_per_rank(np.array([[40.0, 20]])), [[30, 30]])
    np.testing.assert_allclose(plan.even().tokens_per_rank(np.array([[40.0, 20]])), [[40, 20]])


def test_layers_are_matched_by_their_numbers():
    plan = Plan(np.array([[0, 1], [1, 0], [1, 0]]), 2, 2, layer_labels=(3, 4, 5))
    loads = Loads(np.array([[30.0, 10], [20, 60]]), "some", (5, 3))
    assert evaluate_by_depth(plan, loads, price_of).par.shape == (1, 2)
    tokens = plan.select([2, 0]).tokens_per_rank(loads.counts)
    np.testing.assert_array_equal(tokens, [[[10, 30], [20, 60]]])


@pytest.mark.parametrize(
    ("labels", "counts", "message"),
    [
        ((7, 8), np.ones((2, 2)), r"no layer 7 of some; it has 3 layers \(3, 4, 5\)"),
        (None, np.ones((2, 2)), "some has 2 layers without numbers; equal numbers of layers"),
        ((3, 4), np.ones((2, 5)), "plan places 2 experts per layer, some counts 5"),
    ],
)
def test_loads_of_another_model_are_refused(labels, counts, message):
    plan = Plan(np.array([[0, 1]] * 3), 2, 2, layer_labels=(3, 4, 5))
    with pytest.raises(ValueError, match=message):
        evaluate_by_depth(plan, Loads(counts, "some", labels), price_of)
