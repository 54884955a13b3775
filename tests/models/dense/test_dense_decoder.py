"""The dense decoder: sizes, tensor parallelism, recomputation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.models.dense import DenseConfig, DenseModel, preset

LLAMA = DenseConfig(
    layers=2, hidden=32, heads=4, ffn=48, vocab=64, sequence=16, kv_heads=2,
    gated=True, norm="rms", positions="rotary", biases=False, tied=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("pangu-2.6b", 2_625_295_360),
        ("pangu-13b", 12_800_870_400),
        ("pangu-200b", 206_861_008_896),
        ("llama-2-7b", 6_738_415_616),
    ],
)
def test_parameters_of_the_presets(name, parameters):
    assert preset(name).parameters == parameters


@pytest.mark.parametrize("config", [preset("pangu-tiny"), LLAMA], ids=["pangu", "llama"])
def test_the_module_has_as_many_parameters_as_its_config_says(config):
    model = nnx.eval_shape(lambda: DenseModel(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == config.parameters


@pytest.mark.parametrize("config", [preset("pangu-tiny"), LLAMA], ids=["pangu", "llama"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_number(config, recompute):
    model = DenseModel(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(1), (2, config.sequence + 1), 0, config.vocab)

    def loss(params, recompute):
        return nnx.merge(graph, params).loss(tokens, recompute)

    plain = jax.value_and_grad(loss)(params, "none")
    again = jax.value_and_grad(loss)(params, recompute)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_no_position_sees_a_later_token():
    config = preset("pangu-tiny")
    model = DenseModel(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(config.sequence + 1)[None] % config.vocab
    changed = tokens.at[0, 40].add(1)

    def before(tokens):  # the loss over the first 40 positions alone
        targets = tokens[:, 1:40]
        short = DenseModel(config, rngs=nnx.Rngs(0))
        x = short.embedding(tokens[:, :-1])[:, :39]
        return short.output(x, short.embedding.words[...], targets)

    assert before(tokens) == before(changed)
    assert model.loss(tokens) != model.loss(changed)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"heads": 3}, "hidden .32. must be a multiple of heads .3."),
        ({"kv_heads": 3}, "heads .4. must be a multiple of kv_heads"),
        ({"layers": 0}, "layers must be a whole number"),
        ({"dropout": 1.0}, "dropout must lie in"),
    ],
)
def test_sizes_that_make_no_model_are_refused(change, says):
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, "vocab": 64, "sequence": 16}
    with pytest.raises(ValueError, match=says):
        DenseConfig(**(sizes | change))


def test_an_unknown_preset_names_the_closest():
    with pytest.raises(ValueError, match="closest: pangu-200b"):
        preset("pangu-20b")
