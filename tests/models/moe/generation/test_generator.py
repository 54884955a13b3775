"""Generation: batches, meshes and drafts change no token; what stops it; what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.mesh import RankMesh
from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.generation.batch import Sampler
from cmjax.models.moe.generation.generator import Generator
from cmjax.models.moe.generation.programs import place_params
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.sharding import shard_params
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.steps import abstract_params

CONFIG = MoEConfig(
    vocab_size=11,
    hidden_size=8,
    layers=1,
    dense_layers=(),
    heads=2,
    attention=LatentAttention(q_lora_rank=4, kv_lora_rank=4, qk_nope_dim=4, qk_rope_dim=2, v_dim=4),
    ffn_size=8,
    expert_ffn_size=6,
    routed_experts=4,
    shared_experts=1,
    experts_per_token=2,
    expert_groups=1,
    groups_per_token=1,
    routed_scale=2.5,
    max_position=64,
    mtp_layers=1,
)
PROMPTS = [[1, 2, 3, 4, 5], [7], [10, 0, 3]]
ALONE = RankMesh(1, 1)
CONTEXT = 24  # one for all: batches of the same sizes share their compiled programs


def _params(config=CONFIG, mtp=True):
    """Random parameters, large enough that attention and experts matter."""
    rng = np.random.default_rng(0)
    parallelism = one_rank(config)
    slots, copies = parallelism.table.arrays()
    tables = {"slots_of_expert": slots, "copies": copies}

    def draw(path, leaf):
        if path[-1].key in tables:
            return jnp.broadcast_to(tables[path[-1].key], leaf.shape)
        gain = leaf.ndim < 3 and "norm" in str(path)
        return jnp.asarray(gain + rng.normal(size=leaf.shape) * (0.1 if gain else 0.7), leaf.dtype)

    return jax.tree_util.tree_map_with_path(
        draw, abstract_params(config, parallelism, "float32", mtp=mtp)
    )


def _generator(mesh=ALONE, params=None, config=CONFIG, **options):
    params = _params() if params is None else params
    parallelism = Parallelism(table=ep_table(4, mesh.ranks, -4 % mesh.ranks), axes=mesh.axes)
    placed = place_params(shard_params(params, parallelism), parallelism, mesh)
    return Generator(config=config, params=placed, parallelism=parallelism, mesh=mesh, **options)


def _run(generator, prompts, new_tokens, **options):
    return generator.generate(prompts, new_tokens, context=CONTEXT, **options)


def _tokens(found):
    return [completion.tokens for completion in found.completions]


@pytest.fixture(scope="module")
def plain():
    return _run(_generator(), PROMPTS, 9)


def test_a_batch_of_different_lengths_on_a_mesh_gives_what_each_prompt_gives_alone(plain):
    spread = _run(_generator(RankMesh(2, 2)), PROMPTS, 9)
    assert _tokens(spread) == _tokens(plain)
    alone = [_tokens(_run(_generator(), [prompt], 9))[0] for prompt in PROMPTS]
    assert alone == _tokens(plain)
    assert [len(tokens) for tokens in alone] == [9, 9, 9]


@pytest.mark.parametrize("mesh", [ALONE, RankMesh(2, 1)], ids=str)
def test_sequence_parallel_prefill_changes_no_token(plain, mesh):
    found = _run(_generator(mesh, sequence_parallel=True, drafts=1), PROMPTS, 9)
    assert _tokens(found) == _tokens(plain)


@pytest.mark.parametrize("chunk", [1, 2, 3, 16, 40])
def test_prefill_in_chunks_changes_no_token(plain, chunk):
    found = _run(_generator(prefill_chunk=chunk), PROMPTS, 9)
    assert _tokens(found) == _tokens(plain)


@pytest.mark.slow
def test_prefill_in_chunks_drafts_and_caches_what_whole_prefill_does():
    sampler = Sampler(temperature=1.5, top_p=0.9, seed=3)
    whole = _run(_generator(drafts=2), PROMPTS, 12, sampler=sampler)
    chunked = _run(
        _generator(RankMesh(2, 1), drafts=2, prefill_chunk=2), PROMPTS, 12, sampler=sampler
    )
    assert _tokens(chunked) == _tokens(whole)
    # a wrong draft, or a wrong entry of the drafting layer's cache, is accepted less often
    assert (chunked.steps, chunked.accepted) == (whole.steps, whole.accepted)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.5, top_p=0.9, seed=3)])
def test_drafts_change_no_token_neither_greedy_nor_sampled(sampler):
    plain = _run(_generator(), PROMPTS, 12, sampler=sampler)
    for drafts in (1, 2) if sampler.temperature else (1,):
        found = _run(_generator(drafts=drafts), PROMPTS, 12, sampler=sampler)
        assert _tokens(found) == _tokens(plain)
        assert found.drafted >= drafts * max(1, found.steps)
        assert found.steps <= plain.steps
        assert found.acceptance == found.accepted / found.drafted
    assert plain.acceptance is None


def test_every_draft_is_accepted_where_the_module_agrees_with_the_model():
    params = _params()
    for stack in (params["main"]["moe"], params["mtp"]["stack"]):  # layers that add nothing
        layer = stack["layers"]
        layer["attention"]["out"]["weight"] *= 0
        layer["moe"]["experts"]["down"]["weight"] *= 0
        layer["moe"]["shared"]["down"]["weight"] *= 0
    hidden = CONFIG.hidden_size
    params["mtp"]["project"]["weight"] = jnp.eye(2 * hidden, hidden)  # takes the embedding
    params["mtp"]["norm_embed"]["gain"] = jnp.ones(hidden)
    params["mtp"]["norm"] = params["main"]["norm"]
    found = _run(_generator(params=params, drafts=1), PROMPTS[:1], 13)
    assert found.acceptance == 1.0
    assert found.steps == 6  # prefill gives the first token, each step two
    assert _tokens(found) == _tokens(_run(_generator(params=params), PROMPTS[:1], 13))


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch():
    hot = Sampler(temperature=2.0, seed=1)
    batch = _tokens(_run(_generator(), [PROMPTS[0]] * 3, 12, sampler=hot))
    assert len(set(map(tuple, batch))) > 1  # each request draws for itself
    assert _tokens(_run(_generator(), PROMPTS[:1], 12, sampler=hot)) == batch[:1]
    other = dataclasses.replace(hot, seed=2)
    assert _tokens(_run(_generator(), PROMPTS[:1], 12, sampler=other)) != batch[:1]


def test_a_request_stops_after_an_end_token_and_the_others_go_on(plain):
    tokens = _tokens(plain)
    end = tokens[0][2]
    found = _run(_generator(), PROMPTS, 9, end_tokens=[end])
    for completion, full in zip(found.completions, tokens, strict=True):
        cut = full.index(end) + 1 if end in full else len(full)
        assert completion.tokens == full[:cut]
        assert completion.reason == ("end token" if end in full else "length")


def test_one_new_token_needs_no_decode_step(plain):
    found = _run(_generator(drafts=1), PROMPTS, 1)
    assert _tokens(found) == [tokens[:1] for tokens in _tokens(plain)]
    assert (found.steps, found.decoded_tokens, found.prompt_tokens) == (0, 0, 9)


@pytest.mark.parametrize(
    ("new", "drafts", "done"), [(4, 0, (3, 12)), (12, 0, (3, 27, 36)), (1, 0, (3,)), (2, 1, (3, 6))]
)
def test_progress_goes_from_prefill_to_all_that_was_asked_for(new, drafts, done):
    """After the prefill and every call: of eight steps, or with drafts of one."""
    seen = []
    found = _run(_generator(drafts=drafts), PROMPTS, new, progress=lambda *at: seen.append(at))
    assert seen == [(count, 3 * new, "generating") for count in done]
    assert found.steps == new - 1


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_steps_that_share_a_call_give_the_tokens_of_single_ones(temperature):
    """`continuous` makes a call for every step."""
    generator, sampler = _generator(), Sampler(temperature=temperature, seed=3)
    together = generator.generate(PROMPTS, 13, sampler=sampler)
    batch = generator.continuous(places=len(PROMPTS), context=32, sampler=sampler)
    for prompt in PROMPTS:
        batch.put(prompt, 13)
    single = {found.request: found.completion.tokens for found in batch}
    assert _tokens(together) == [single[number] for number in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4), "no prompt given"),
        (([[1], []], 4), "prompt 2 is empty"),
        (([[1, 11]], 4), r"prompt 1 holds token 11; the model's are 0\.\.10"),
        (([[1]], 0), "new_tokens must be at least 1, got 0"),
        (([[1], [2] * 60], 5), "prompt 2 has 60 tokens and is to get 5 more, the cache holds 64"),
        (([[1] * 9], 4, None, 12), "prompt 1 has 9 tokens .* holds 12 .* or enlarge the context"),
        (([[1]], 4, None, 65), "context of 65 tokens is more than the 64"),
    ],
)
def test_requests_that_do_not_fit_are_refused_with_their_sizes(arguments, message):
    prompts, new_tokens, *rest = arguments
    options = dict(zip(("sampler", "context"), rest, strict=False))
    params = {"main": {}}
    generator = Generator(config=CONFIG, params=params, parallelism=one_rank(CONFIG), mesh=ALONE)
    with pytest.raises(ValueError, match=message):
        generator.generate(prompts, new_tokens, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sampler(temperature=-1), "temperature must be at least 0, got -1"),
        (lambda: Sampler(top_p=1.5), r"top_p must lie in 0\.\.1, got 1.5"),
        (lambda: Sampler(temperature=float("nan")), "temperature must be a finite number, got nan"),
        (lambda: Sampler(temperature=float("inf")), "temperature must be a finite number, got inf"),
        (lambda: Sampler(top_p=0), "top_p must be more than 0, got 0"),
        (lambda: Sampler(top_p=float("nan")), r"top_p must lie in 0\.\.1, got nan"),
        (lambda: Sampler(top_k=-1), "top_k must be at least 0 .* got -1"),
        (lambda: Sampler(seed=-2), "seed must be 0 to 4294967295, got -2"),
        (
            lambda: Generator(
                config=CONFIG,
                params={"main": {}},
                parallelism=one_rank(CONFIG),
                mesh=ALONE,
                drafts=2,
            ),
            r"2 draft\(s\) per step need the weights of a multi-token",
        ),
        (lambda: _generator(prefill_chunk=0), "prefill_chunk must be at least 1 token, got 0"),
        (
            lambda: _generator(prefill_chunk=2, sequence_parallel=True),
            "chunks of 2 tokens .* choose either prefill_chunk or sequence_parallel",
        ),
        (
            lambda: _generator(RankMesh(2, 2), sequence_parallel=True),
            "heads to divide over the ranks, got 2 heads and 4 ranks",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_likeliest_few_are_drawn_from(plain):
    hot = Sampler(temperature=9.0, top_k=1, seed=5)
    assert _tokens(_run(_generator(), PROMPTS, 9, sampler=hot)) == _tokens(plain)
    wide = _tokens(_run(_generator(), PROMPTS, 9, sampler=dataclasses.replace(hot, top_k=0)))
    assert wide != _tokens(plain)
    cold = Sampler(temperature=1e-300, seed=5)
    assert _tokens(_run(_generator(), PROMPTS, 9, sampler=cold)) == _tokens(plain)
