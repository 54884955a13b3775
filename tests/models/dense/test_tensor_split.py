"""Tensor-parallel ranks give one device's loss and gradients, whatever is recomputed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.models.dense import DenseConfig, DenseModel, TensorSplit, preset

LLAMA = DenseConfig(
    layers=2, hidden=32, heads=4, ffn=48, vocab=64, sequence=16, kv_heads=4,
    gated=True, norm="rms", positions="rotary", biases=False, tied=False,
)  # fmt: skip
SUMMED = {"gain", "shift", "output_bias", "ffn_bias"}
"""Held by every rank, and with sequence parallelism applied to its own part of the sequence only:
their gradients are addends."""


def _name(path) -> str:
    return str(next(k.key for k in reversed(path) if isinstance(getattr(k, "key", None), str)))


def _shards(whole, own, ranks):
    """Every rank's part of `whole`, stacked: cut where the shapes differ."""

    def cut(x, like):
        axes = [i for i, (a, b) in enumerate(zip(x.shape, like.shape, strict=True)) if a != b]
        parts = jnp.split(x, ranks, axes[0]) if axes else [x] * ranks
        return jnp.stack(parts)

    return jax.tree.map(cut, whole, own)


def _joined(path, stacked, whole, sequence):
    pairs = zip(stacked.shape[1:], whole.shape, strict=True)
    if axes := [i for i, (own, all_) in enumerate(pairs) if own != all_]:
        return jnp.concatenate(list(stacked), axes[0])
    if sequence and _name(path) in SUMMED:
        return jnp.sum(stacked, 0)
    np.testing.assert_allclose(stacked[0], stacked[-1], rtol=1e-5, atol=1e-7)
    return stacked[0]


@pytest.mark.parametrize("config", [preset("pangu-tiny"), LLAMA], ids=["pangu", "llama"])
@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_tensor_parallel_ranks_give_one_devices_loss_and_gradients(config, sequence, recompute):
    """Sums are in another order: float32's rounding over up to 256 addends."""
    ranks = 4
    split = TensorSplit(ranks, sequence)
    graph, whole = nnx.split(DenseModel(config, rngs=nnx.Rngs(0)))
    whole = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape), whole)
    own_graph, own = nnx.split(
        nnx.eval_shape(lambda: DenseModel(config, split=split, rngs=nnx.Rngs(0)))
    )
    tokens = jax.random.randint(jax.random.key(1), (2, config.sequence + 1), 0, config.vocab)

    def alone(params):
        return nnx.merge(graph, params).loss(tokens)

    def rank(params):
        return nnx.merge(own_graph, params).loss(tokens, recompute)

    loss, gradients = jax.jit(jax.value_and_grad(alone))(whole)
    run = jax.jit(jax.vmap(jax.value_and_grad(rank), axis_name=split.axis))
    losses, parts = run(_shards(whole, own, ranks))
    np.testing.assert_allclose(losses, float(loss), rtol=1e-5)
    found = jax.tree_util.tree_map_with_path(
        lambda path, g, w: _joined(path, g, w, sequence), parts, gradients
    )
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradients))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        # The gradient of the keys' bias is zero, and rounding on both sides.
        atol = max(1e-5 * float(jnp.max(jnp.abs(b))), 1e-7 * largest)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)
