"""Loads are finite counts with tokens in every layer; layers may have numbers of their own."""

import numpy as np
import pytest

from cmjax.placement import Loads

COUNTS = np.array([[3.0, 1.0, 0.0, 4.0], [2.0, 2.0, 5.0, 1.0]])


def test_scaled_keeps_the_shares_and_sets_the_total():
    loads = Loads(COUNTS).scaled(1000.0)
    np.testing.assert_allclose(loads.counts.sum(-1), 1000.0)
    np.testing.assert_allclose(loads.counts[0] / 1000, COUNTS / COUNTS.sum(-1, keepdims=True))


def test_scaling_keeps_source_and_layer_numbers():
    loads = Loads(COUNTS, "here", (3, 9)).scaled(10.0)
    assert (loads.source, loads.layer_labels) == ("here", (3, 9))


def test_shrunk_loads_keep_totals_and_lose_a_share_of_the_differences():
    loads = Loads(COUNTS, "here", (3, 9)).shrunk(0.7)
    np.testing.assert_allclose(loads.counts.sum(-1)[0], COUNTS.sum(-1))
    mean = COUNTS.mean(-1, keepdims=True)
    np.testing.assert_allclose(loads.counts[0] - mean, 0.3 * (COUNTS - mean), atol=1e-12)
    assert (loads.source, loads.layer_labels) == ("here", (3, 9))
    with pytest.raises(ValueError, match=r"shrink must lie between 0 and 1, got 1\.5"):
        loads.shrunk(1.5)


@pytest.mark.parametrize("labels", [(1,), (1, 1), (-1, 0), (0.5, 1), (True, 2)])
def test_layer_numbers_that_name_no_layers_are_refused(labels):
    with pytest.raises(ValueError, match="here: expected 2 different layer numbers"):
        Loads(COUNTS, "here", labels)


def test_layers_are_numbered_where_the_recording_does_not():
    assert Loads(COUNTS).numbered(3).layer_labels == (3, 4)
    assert Loads(COUNTS, "here", (5, 9)).numbered(3).layer_labels == (5, 9)
    assert Loads(COUNTS).numbered(None).layer_labels is None


def test_joined_workloads_count_alike():
    one, two = Loads(COUNTS, "one", (3, 4)), Loads(np.stack([COUNTS[::-1], COUNTS]) * 50, "two")
    both = one.join(two)
    assert both.counts.shape == (3, 2, 4) and (both.source, both.layer_labels) == ("one", (3, 4))
    np.testing.assert_allclose(both.counts.sum(-1), COUNTS.sum(-1).mean())
    np.testing.assert_allclose(both.counts[1] / both.counts[1].sum(-1, keepdims=True),
                               COUNTS[::-1] / COUNTS[::-1].sum(-1, keepdims=True))  # fmt: skip


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Loads(COUNTS[:, :3], "two"), "two: 2 layers of 3 experts; one has 2 of 4"),
        (Loads(COUNTS, "two", (4, 5)), "two: numbers its layers otherwise than one"),
    ],
)
def test_loads_of_different_models_are_not_joined(other, message):
    with pytest.raises(ValueError, match=message):
        Loads(COUNTS, "one", (3, 4)).join(other)
