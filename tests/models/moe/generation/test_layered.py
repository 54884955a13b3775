"""Generation with an array for every layer, and with rows sorted by expert, against the scan over
stacks and the static blocks of dispatch."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.models.moe import open_generator, tiny
from cmjax.models.moe.config import GroupedAttention
from cmjax.models.moe.generation.batch import RequestBatch, Sampler
from cmjax.models.moe.generation.open import GeneratorOptions
from cmjax.models.moe.generation.programs import BatchShape
from cmjax.models.moe.layered import are_split
from cmjax.models.moe.layers import moe
from cmjax.models.moe.schedule import Schedule
from cmjax.models.moe.steps import abstract_decode
from cmjax.program import trace
from cmjax.verify.traffic import count_traffic, pair_bytes, priced_bytes, tier_bytes

PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9]]


def _tokens(found):
    return [completion.tokens for completion in found.completions]


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8", "msd_w8a16"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_layers_apart_and_sorted_rows_give_the_same_tokens(monkeypatch, arithmetic, chunk):
    if arithmetic == "int8":  # a call may round to the next of 127 steps: tests/.../test_one_call
        monkeypatch.setattr(moe, "is_mixed_at_once", lambda *_: False)
    options = GeneratorOptions(arithmetic=arithmetic, prefill_chunk=chunk)
    apart = open_generator(tiny(), options=options)
    stacked = open_generator(tiny(), options=options, split=False)
    blocks = dataclasses.replace(stacked.parallelism, sort_rows=False)
    stacked = dataclasses.replace(stacked, parallelism=blocks)
    assert are_split(apart.params) and not are_split(stacked.params)
    assert apart.parallelism.sorts_rows and not blocks.sorts_rows
    assert _tokens(apart.generate(PROMPTS, 8)) == _tokens(stacked.generate(PROMPTS, 8))


@pytest.mark.parametrize("mesh", [RankMesh(1, 8), RankMesh(1, 2, 2)], ids=str)
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8", "msd_w8a16"])
def test_sorted_rows_of_the_ranks_of_a_device_give_the_same_scores(mesh, arithmetic):
    """Of a prompt, and with its draft the tokens after it."""
    rows = open_generator(tiny(), mesh, GeneratorOptions(arithmetic=arithmetic))
    static = dataclasses.replace(rows.parallelism, sort_rows=False)
    blocks = dataclasses.replace(rows, parallelism=static)
    prompts = [[n + 1, n + 2, 3 * n] for n in range(mesh.ranks)]
    batch = RequestBatch.of(prompts, 16, mesh.ranks, 1, 1, Sampler())
    scores = []
    for generator in (rows, blocks):
        sizes = generator.sizes(requests=1, prompt=16, room=16, greedy=True)
        out = generator.prefilling(sizes).run(generator.used_params, batch.prefill_inputs())
        scores.append(np.asarray(out.logits))
    atol = 2e-2 if arithmetic == "bfloat16" else 1e-5
    np.testing.assert_allclose(*scores, atol=atol)
    assert np.abs(scores[0]).max() > 0.1
    assert _tokens(rows.generate(prompts, 6)) == _tokens(blocks.generate(prompts, 6))


def test_the_blocks_of_sorted_rows_are_counted_as_they_are_priced():
    mesh = RankMesh(1, 2, 2)
    generator = open_generator(tiny(), mesh, GeneratorOptions(drafts=0))
    assert generator.parallelism.sorts_rows
    batch = RequestBatch.of([[1]] * 4, 16, 4, 1, 0, Sampler())
    sizes = generator.sizes(requests=1, prompt=16, room=16, greedy=True)
    decoding = generator.decoding(sizes)
    inputs = batch.decode_inputs(np.zeros((4, 1, 1), np.int32), batch.lengths)
    counting = on_every_rank(count_traffic(decoding.run.fn, mesh), mesh, decoding.run.specs, RANKED)
    arguments = (generator.used_params, (decoding.empty_cache(),), inputs)
    _, found = jax.block_until_ready(jax.jit(counting)(*arguments))
    counted = [
        tier_bytes(pair_bytes(received.moved), mesh)
        for name, received in found.items()
        if "flags" not in name
    ]
    table = generator.parallelism.table
    floats = {"precision": "float32", "kv_cache": "float32"}
    step = abstract_decode(tiny(), Schedule(), table, mesh, 1, 16, capacity=1, mtp=0, **floats)
    lifted = on_every_rank(step.fn, mesh, step.in_specs, step.out_specs, abstract=True)
    priced = priced_bytes(trace(lifted, *step.args), {}, mesh)
    assert {tier: sum(each[tier] for each in counted) for tier in priced} == priced
    assert priced["node"] > 0


def test_a_step_reads_no_copy_of_the_weights():
    """Compiled, no instruction but a view has an array of all layers."""
    generator = open_generator(tiny(), options=GeneratorOptions(drafts=0))
    found = generator.generate(PROMPTS[:1], 2)
    assert found.steps == 1
    config = generator.config
    width = 2 * config.expert_ffn_size
    stack = f"f32[{config.moe_layers},{config.routed_experts},{config.hidden_size},{width}]"
    text = _decode_program(generator).as_text()
    assert stack not in text and stack.replace("[", "[1,") not in text


@pytest.mark.parametrize("requests", [1, 3])
def test_a_step_writes_new_tokens_where_the_cache_lies(requests):
    """Compiled, no instruction copies an array with room for all tokens."""
    grouped = dataclasses.replace(
        tiny(), attention=GroupedAttention(kv_heads=2, head_dim=16), family="mixtral"
    )
    generator = open_generator(grouped, options=GeneratorOptions(drafts=0))
    text = _decode_program(generator, requests=requests, room=47).as_text()
    assert re.search(r"\[[\d,]*,47,\d+,\d+\]", text)
    assert not re.search(r"= \w+\[[\d,]*,47,\d+,\d+\]\S* copy\(", text)


def _decode_program(generator, requests=1, room=16):
    sizes = BatchShape(requests=requests, prompt=16, room=room, layered=True)
    return generator.decoding(sizes).run.compiled


def test_greedy_tokens_are_those_of_a_nucleus_of_one():
    """Sampling from the likeliest token alone takes the path that sorts."""
    generator = open_generator(tiny())
    greedy = generator.generate(PROMPTS, 6)
    sorting = generator.generate(PROMPTS, 6, sampler=Sampler(temperature=1.0, top_k=1))
    assert _tokens(greedy) == _tokens(sorting)
    assert len(np.unique(np.concatenate(_tokens(greedy)))) > 1
