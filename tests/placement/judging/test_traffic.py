"""Bytes between nodes, expected from counts."""

import numpy as np
import pytest

from cmjax.placement import node_bytes


def test_a_node_receives_its_share_from_the_others():
    tokens = np.array([[3.0, 1, 2, 2], [0, 4, 4, 0]])
    found = node_bytes(tokens, 2, 100.0)
    np.testing.assert_allclose(found, [[200, 200], [200, 200]])
    np.testing.assert_allclose(node_bytes(tokens, 4, 100.0), 75 * tokens)
    assert (node_bytes(tokens, 1, 100.0) == 0).all()
    with pytest.raises(ValueError, match="4 ranks do not divide over 3 nodes"):
        node_bytes(tokens, 3, 1.0)
