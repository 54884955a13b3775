"""Requests that join and leave between steps get the tokens that they get alone, and sooner."""

import dataclasses
import threading

import numpy as np
import pytest

from cmjax.mesh import RankMesh
from cmjax.models.moe import Sampler, open_generator, tiny
from cmjax.models.moe.generation.open import GeneratorOptions

CONTEXT = 40
REQUESTS = [  # of lengths that fall into two widths of prefill
    ([1, 2, 3, 4, 5], 12),
    ([7], 2),
    ([10, 0, 3], 3),
    (list(range(30, 50)), 5),
    ([9, 9], 1),
    ([200, 100, 50], 7),
    ([3, 1, 4, 1, 5, 9, 2, 6], 4),
]


def _open(mesh=None, **changed):
    options = dataclasses.replace(GeneratorOptions(drafts=0), **changed)
    return open_generator(tiny(), mesh, options, requests=4, prompt_tokens=20)


def _alone(generator, **options):
    found = [generator.generate([p], n, context=CONTEXT, **options) for p, n in REQUESTS]
    return [completion.tokens for one in found for completion in one.completions]


def _together(generator, places, requests=REQUESTS, **options):
    batch = generator.continuous(places=places, context=CONTEXT, **options)
    numbers = [batch.put(prompt, new_tokens) for prompt, new_tokens in requests]
    assert numbers == list(range(len(requests)))
    found = dict(batch)
    assert sorted(found) == numbers and batch.running == batch.waiting == 0
    return batch, [found[number].tokens for number in numbers]


@pytest.fixture(scope="module")
def plain():
    return _open()


@pytest.fixture(scope="module")
def alone(plain):
    tokens = _alone(plain)
    assert [len(t) for t in tokens] == [n for _, n in REQUESTS]
    assert len({t[0] for t in tokens}) > 3  # requests that got each other's place would show
    return tokens


@pytest.mark.parametrize("places", [1, 2, 3, 9])
def test_tokens_are_those_of_each_request_alone(plain, alone, places):
    assert _together(plain, places)[1] == alone


def test_prefill_in_chunks_joins_too(alone):
    assert _together(_open(prefill_chunk=3), 2)[1] == alone


@pytest.mark.parametrize("places", [3, 8])
def test_on_a_mesh_of_ranks_too(alone, places):
    """Four ranks: as many places as it takes to give each rank as many."""
    batch, tokens = _together(_open(RankMesh(2, 2)), places)
    assert tokens == alone
    assert batch.places == (4 if places == 3 else 8)


def test_drafts_change_no_token_and_the_last_step_gives_no_more_than_was_asked_for(alone):
    assert _together(_open(drafts=1), 2)[1] == alone


def test_layers_in_a_stack_join_too(plain, alone):
    stacked = open_generator(tiny(), options=GeneratorOptions(drafts=0), split=False)
    assert _together(stacked, 2)[1] == alone


@pytest.mark.parametrize("kv_cache", ["int8", "bfloat16"])
def test_every_format_of_the_cache_joins(kv_cache):
    generator = _open(kv_cache=kv_cache)
    assert _together(generator, 2)[1] == _alone(generator)


def test_sampled_tokens_are_those_of_a_batch_of_the_same_prompts(plain):
    hot = Sampler(temperature=1.5, top_p=0.9, seed=3)
    prompts, new = [prompt for prompt, _ in REQUESTS], 5
    batch = plain.generate(prompts, new, sampler=hot, context=CONTEXT).completions
    together = _together(plain, 2, [(prompt, new) for prompt in prompts], sampler=hot)[1]
    assert together == [completion.tokens for completion in batch]


def test_no_request_waits_for_the_longest_of_a_batch(plain):
    """Twelve tokens in one place; meanwhile five requests of two pass through the other."""
    batch = plain.continuous(places=2, context=CONTEXT)
    for new_tokens in (12, 2, 2, 2, 2, 2):
        batch.put([1, 2], new_tokens)
    assert [request for request, _ in batch] == [1, 2, 3, 4, 5, 0]
    assert batch.steps == 11  # batches of two, each as long as its longest: 11 + 1 + 1


def test_a_step_computes_the_places_that_are_taken(plain, alone):
    """Eight places. One request runs for eleven steps; two others leave after one and two."""
    batch = plain.continuous(places=8, context=CONTEXT)
    for number, new_tokens in ((0, 12), (5, 2), (6, 3)):
        batch.put(REQUESTS[number][0], new_tokens)
    found = {request: completion.tokens for request, completion in batch}
    assert batch.steps == 11
    assert batch.computed == 4 + 2 + 9 * 1  # three in four places, two in two, one in one
    assert found == {0: alone[0], 1: alone[5][:2], 2: alone[6][:3]}
    assert batch.places == 8  # those that come later find room
    for prompt, new_tokens in REQUESTS:
        batch.put(prompt, new_tokens)
    assert {request - 3: completion.tokens for request, completion in batch} == dict(
        enumerate(alone)
    )


def test_requests_may_come_while_others_run_and_after_all_have_left(plain, alone):
    batch, found = plain.continuous(places=2, context=CONTEXT), {}
    batch.put(*REQUESTS[0])
    for request, completion in batch:
        found[request] = completion.tokens
        if len(found) == 1:
            for put in REQUESTS[1:4]:
                batch.put(*put)
    assert len(found) == 4
    thread = threading.Thread(target=lambda: [batch.put(*put) for put in REQUESTS[4:]])
    thread.start()
    thread.join()
    found |= {request: completion.tokens for request, completion in batch}
    assert [found[i] for i in range(len(REQUESTS))] == alone
    assert list(batch) == [] == batch.step()


def test_what_steps_give_adds_up_to_the_completions(plain, alone):
    batch = plain.continuous(places=2, context=CONTEXT)
    for put in REQUESTS:
        batch.put(*put)
    tokens = [[] for _ in REQUESTS]
    assert (batch.running, batch.waiting) == (0, len(REQUESTS))
    while batch.running or batch.waiting:
        for emitted in batch.step():
            assert emitted.tokens
            tokens[emitted.request] += emitted.tokens
            if emitted.completion is not None:
                assert emitted.completion.tokens == tokens[emitted.request]
                assert emitted.completion.reason == "length"
    assert tokens == alone


def test_an_end_token_frees_the_place(plain, alone):
    end = alone[0][3]
    batch = plain.continuous(places=1, context=CONTEXT, end_tokens=[end])
    batch.put(*REQUESTS[0])
    (found,) = batch
    assert found.completion.tokens == alone[0][: alone[0].index(end) + 1]
    assert found.completion.reason == "end token"
    assert batch.steps == alone[0].index(end)


def test_a_request_may_fill_its_place_to_the_last_token(plain):
    prompt = np.random.default_rng(0).integers(0, 256, CONTEXT - 6).tolist()
    batch = plain.continuous(places=2, context=CONTEXT)
    batch.put(prompt, 6)
    (found,) = batch
    wanted = plain.generate([prompt], 6).completions[0]
    assert found.completion == wanted


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [
        ([], 3, "put: the prompt is empty"),
        ([1, 999], 3, r"put: the prompt holds token 999; the model's are 0\.\.\d+$"),
        ([1], 0, "put: new_tokens must be at least 1, got 0"),
        ([1] * 35, 6, "put: the prompt has 35 tokens and is to get 6 more, the cache holds 40"),
    ],
)
def test_a_request_that_cannot_be_is_refused_at_the_door(plain, alone, prompt, new_tokens, message):
    batch = plain.continuous(places=2, context=CONTEXT)
    batch.put(*REQUESTS[0])
    with pytest.raises(ValueError, match=message):
        batch.put(prompt, new_tokens)
    assert [(n, done.tokens) for n, done in batch] == [(0, alone[0])]


def test_places_and_a_context_that_cannot_be_are_refused(plain):
    with pytest.raises(ValueError, match="places must be at least 1, got 0"):
        plain.continuous(places=0)
    limit = plain.config.context_limit
    for context in (1, limit + 1):
        with pytest.raises(
            ValueError, match=f"context must be 2 to {limit} tokens.* got {context}"
        ):
            plain.continuous(places=1, context=context)
