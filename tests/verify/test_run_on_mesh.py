"""A program of one rank, run on every rank in one call, and the bytes it sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmjax
from cmjax.mesh import RANKED, REPLICATED

MESH = cmjax.RankMesh(nodes=2, npus=2, dies=2)


def swapped(x, scale):
    return scale * jax.lax.all_to_all(x, MESH.axes, 0, 0, tiled=True)


X = np.arange(64.0, dtype=np.float32).reshape(8, 8)


def test_the_result_is_that_of_every_rank():
    found = cmjax.run_on_mesh(swapped, MESH, X, 2.0, in_specs=(RANKED, REPLICATED))
    np.testing.assert_array_equal(found, 2 * X.T)


def test_every_rank_sends_its_number_to_every_other():
    _, sent = cmjax.run_on_mesh(
        swapped, MESH, X, 2.0, in_specs=(RANKED, REPLICATED), count_bytes=True
    )
    assert sent.tier_bytes == {"own": 4 * 8, "die": 4 * 8, "node": 4 * 8 * 2, "supernode": 4 * 32}
    (pairs,) = sent.pairs.values()
    np.testing.assert_array_equal(pairs, np.full((8, 8), 4))
    assert sent.to_dict()["bytes"] == sent.tier_bytes
    assert "supernode 128" in repr(sent) and "<table>" in sent._repr_html_()


def test_an_all_reduce_moves_its_array_twice_but_for_ones_own_share():
    """Every rank sends each other its addends of a share, then the share that it added up."""
    _, sent = cmjax.run_on_mesh(
        lambda x: jax.lax.psum(x, MESH.axes), MESH, jnp.ones((8, 16)), count_bytes=True
    )
    share = 16 * 4 // 8
    np.testing.assert_array_equal(sent.pairs["psum.0"], np.full((8, 8), 2 * share))


def test_only_the_branch_that_is_taken_sends():
    def fn(x):
        odd = jax.lax.axis_index("node") == 1

        def gather(x):
            return jax.lax.all_gather(x, "die").sum(0)

        return jax.lax.cond(odd, gather, lambda x: x, x)

    _, sent = cmjax.run_on_mesh(fn, MESH, jnp.ones((8, 3)), count_bytes=True)
    ranks = np.arange(8)
    pairs = (ranks[:, None] // 2 == ranks // 2) & (ranks >= 4)
    np.testing.assert_array_equal(sent.pairs["all_gather.0"], 12 * pairs)


def test_an_argument_without_its_axis_of_ranks_is_refused():
    with pytest.raises(ValueError, match="leading axis of 8 ranks"):
        cmjax.run_on_mesh(lambda x: x, MESH, jnp.arange(4.0))
