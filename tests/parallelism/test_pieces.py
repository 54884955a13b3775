"""The traced training step against the closed forms of Korthikanti et al. (arXiv 2205.05198)."""

import pytest

from cmjax.models.dense import DenseConfig, TensorSplit
from cmjax.parallelism import pieces

GPT = DenseConfig(
    layers=48, hidden=6144, heads=64, ffn=4 * 6144, vocab=51200, sequence=2048, dropout=0.1
)
ONE = {pieces.BATCH: 1.0}
SCORES = 5 * 64 * 2048 / 6144


@pytest.mark.parametrize(
    "ranks, sequence, recompute, per_element",
    [
        (1, False, "none", 34 + SCORES),
        (8, False, "none", 10 + 24 / 8 + SCORES / 8),
        (8, True, "none", (34 + SCORES) / 8),
        (8, False, "selective", 10 + 24 / 8),
        (8, True, "selective", 34 / 8),
        (8, False, "full", 2),
        (8, True, "full", 2 / 8),
    ],
)
def test_a_layer_keeps_the_bytes_of_the_published_formula(ranks, sequence, recompute, per_element):
    """Table 2 of the paper, exactly: 34 + 5 a s / h bytes an element and what splits it."""
    piece = pieces.layer(GPT, TensorSplit(ranks, sequence), recompute)
    assert piece.kept.evaluate(ONE) == pytest.approx(2048 * 6144 * per_element, rel=1e-12)


def _matrix_flops(piece, part):
    return piece.programs[part]().totals(ONE)["cube_flops_16bit"]


def test_a_layers_passes_have_the_flop_of_megatrons_formula():
    forward = 24 * 2048 * 6144**2 * (1 + 2048 / (6 * 6144))
    piece = pieces.layer(GPT, TensorSplit(8), "none")
    assert _matrix_flops(piece, "forward") == pytest.approx(forward / 8, rel=1e-12)
    assert _matrix_flops(piece, "both") == pytest.approx(3 * forward / 8, rel=1e-12)


def test_full_recomputation_is_one_more_forward_pass_but_for_its_last_product():
    none, full = (pieces.layer(GPT, TensorSplit(8), r) for r in ("none", "full"))
    last = 2 * 2048 * 4 * 6144**2 / 8  # W_2's result is not needed again
    more = _matrix_flops(full, "both") - _matrix_flops(none, "both")
    assert more == pytest.approx(_matrix_flops(none, "forward") - last, rel=1e-12)


@pytest.mark.parametrize("recompute, reduces", [("none", 4), ("full", 5)])
def test_tensor_parallel_ranks_send_two_all_reduces_a_pass(recompute, reduces):
    """The recomputed pass needs the sum behind attention again, not the last one of the layer."""
    piece = pieces.layer(GPT, TensorSplit(8), recompute)
    one = 2 * 7 / 8 * 2048 * 6144 * 2
    assert piece.programs["both"]().totals(ONE)["node_bytes"] == pytest.approx(reduces * one)
