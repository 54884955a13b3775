"""Generation with an array for every layer, and with rows sorted by expert, against the scan over
stacks and the static blocks of dispatch."""

import dataclasses
import re

import numpy as np
import pytest

from cmjax.models.moe import open_generator, tiny
from cmjax.models.moe.config import GroupedAttention
from cmjax.models.moe.generation.batch import Sampler
from cmjax.models.moe.generation.open import GeneratorOptions
from cmjax.models.moe.generation.programs import BatchShape, compile_programs
from cmjax.models.moe.layered import are_split

PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9]]


def _tokens(found):
    return [completion.tokens for completion in found.completions]


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8", "msd_w8a16"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_layers_apart_and_sorted_rows_give_the_same_tokens(arithmetic, chunk):
    options = GeneratorOptions(arithmetic=arithmetic, prefill_chunk=chunk)
    apart = open_generator(tiny(), options=options)
    stacked = open_generator(tiny(), options=options, split=False)
    blocks = dataclasses.replace(stacked.parallelism, sort_rows=False)
    stacked = dataclasses.replace(stacked, parallelism=blocks)
    assert are_split(apart.params) and not are_split(stacked.params)
    assert apart.parallelism.sorts_rows and not blocks.sorts_rows
    assert _tokens(apart.generate(PROMPTS, 8)) == _tokens(stacked.generate(PROMPTS, 8))


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
    programs = compile_programs(
        generator.config,
        generator.parallelism,
        generator.mesh,
        generator.precision,
        generator.kv_cache,
        sizes,
    )
    return programs.decode.compiled


def test_greedy_tokens_are_those_of_a_nucleus_of_one():
    """Sampling from the likeliest token alone takes the path that sorts."""
    generator = open_generator(tiny())
    greedy = generator.generate(PROMPTS, 6)
    sorting = generator.generate(PROMPTS, 6, sampler=Sampler(temperature=1.0, top_k=1))
    assert _tokens(greedy) == _tokens(sorting)
    assert len(np.unique(np.concatenate(_tokens(greedy)))) > 1
