"""The one-rank model against Hugging Face's logits, and its attention forms against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmjax.models.moe.checkpoint.load import load
from cmjax.models.moe.layers.cache import extend_cache
from cmjax.models.moe.layers.transformer import prefill_attention

FIXTURES = (
    "deepseek_v2_tiny",
    "deepseek_v3_tiny",
    "deepseek_v3_yarn_tiny",
    "mixtral_tiny",
    "qwen3_moe_tiny",
)


@functools.cache
def _loaded(folder):
    graph, state = nnx.split(load(folder))
    return graph, nnx.to_pure_dict(state), dict(np.load(folder / "reference.npz"))


@functools.partial(jax.jit, static_argnums=0)
def _prefill(graph, params, tokens):
    main = nnx.merge(graph, params).main
    hidden, caches = main.prefill((tokens,), "float32")
    return main.logits(hidden[0]), caches[0]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph, params, tokens):
    main = nnx.merge(graph, params).main
    stack = main.moe if main.dense is None else main.dense
    attend = prefill_attention("float32")
    first, _ = stack((main.embedding(tokens),), (None,), attend, slice(0, 1))
    (last,), _ = main.prefill((tokens,), "float32")
    return first[0], last, main.logits(last)


@functools.partial(jax.jit, static_argnums=0)
def _decode(graph, params, tokens, cache, lengths):
    main = nnx.merge(graph, params).main
    hidden, caches = main.decode((tokens,), (cache,), (lengths,))
    return main.logits(hidden[0]), caches[0]


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_and_hidden_states_equal_hugging_face(data, name):
    graph, params, reference = _loaded(data / "hf_fixtures" / name)
    found = _hidden(graph, params, jnp.asarray(reference["input_ids"], jnp.int32))
    for got, want in zip(found, ("hidden_first", "hidden_last", "logits"), strict=True):
        np.testing.assert_allclose(got, reference[want], atol=1e-4, err_msg=want)


@pytest.mark.parametrize("name", ["deepseek_v2_tiny", "deepseek_v3_yarn_tiny", "qwen3_moe_tiny"])
def test_decoding_several_tokens_at_once_equals_whole_prompts(data, name):
    graph, params, reference = _loaded(data / "hf_fixtures" / name)
    tokens, new = jnp.asarray(reference["input_ids"][:, :24], jnp.int32), 3
    _, cache = _prefill(graph, params, tokens[:, : 24 - 2 * new])
    cache = extend_cache(cache, 24)
    for start in (24 - 2 * new, 24 - new):
        lengths = jnp.full((2,), start, jnp.int32)
        got, cache = _decode(graph, params, tokens[:, start : start + new], cache, lengths)
        np.testing.assert_allclose(got, reference["logits"][:, start : start + new], atol=1e-4)


def test_decode_keeps_requests_of_different_lengths_apart(data):
    graph, params, reference = _loaded(data / "hf_fixtures" / FIXTURES[0])
    tokens = jnp.asarray(reference["input_ids"][:, :12], jnp.int32)
    full, _ = _prefill(graph, params, tokens)
    _, cache = _prefill(graph, params, tokens)  # entries beyond a request's length are rubbish
    lengths = jnp.array([5, 9], jnp.int32)
    got, _ = _decode(graph, params, tokens[jnp.arange(2), lengths][:, None], cache, lengths)
    np.testing.assert_allclose(got[:, 0], full[jnp.arange(2), lengths], atol=1e-5)


@pytest.mark.parametrize("name", FIXTURES)
def test_greedy_tokens_equal_hugging_face(data, name):
    graph, params, reference = _loaded(data / "hf_fixtures" / name)
    prompt = jnp.asarray(reference["greedy_prompt"], jnp.int32)
    want = reference["greedy_tokens"][0]
    logits, cache = _prefill(graph, params, prompt)
    cache = extend_cache(cache, len(want))
    found = [*np.asarray(prompt[0]), int(jnp.argmax(logits[0, -1]))]
    while len(found) < len(want):
        lengths = jnp.array([len(found) - 1], jnp.int32)
        newest = jnp.array([[found[-1]]], jnp.int32)
        logits, cache = _decode(graph, params, newest, cache, lengths)
        found.append(int(jnp.argmax(logits[0, -1])))
    np.testing.assert_array_equal(found, want)
