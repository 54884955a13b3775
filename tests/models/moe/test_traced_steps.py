"""Steps are traced at any size, for prices: in every form, on meshes that nobody has."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import export

from cmjax.mesh import RankMesh, on_every_rank
from cmjax.models.moe.presets import deepseek_r1, tiny
from cmjax.models.moe.schedule import Schedule, two_stream_decode
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.steps import abstract_decode, abstract_prefill

CONFIG = tiny()
TABLE = ep_table(16, 8, redundant=8)


@pytest.mark.parametrize("mtp", [0, 1, 2])
@pytest.mark.parametrize("parallel", [False, True])
def test_steps_trace_with_whole_numbers_in_every_form(mtp, parallel):
    mesh, table = RankMesh(2, 2, 2), TABLE
    decode = abstract_decode(
        CONFIG, Schedule(), table, mesh, requests=3, context=16,
        capacity=2, precision="bfloat16", kv_cache="int8", mtp=mtp,
    )  # fmt: skip
    prefill = abstract_prefill(
        CONFIG, Schedule(), table, mesh, sequences=3, prompt=16,
        precision="float32", kv_cache="float32", mtp=mtp, sequence_parallel=parallel,
    )  # fmt: skip
    for step, new in ((decode, 1 + mtp), (prefill, 1 + bool(mtp))):
        fn = on_every_rank(step.fn, mesh, step.in_specs, step.out_specs, abstract=True)
        assert jax.eval_shape(fn, *step.args).tokens.shape == (8, 3, new)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_deepseek_r1_traces_on_320_ranks_with_symbolic_sizes(microbatches):
    requests, context, capacity = export.symbolic_shape("b, n, c")
    schedule = dataclasses.replace(two_stream_decode(), microbatches=microbatches)
    mesh = RankMesh(20, 8, 2)
    table = ep_table(256, 320, redundant=32, shared_replicas=32)
    step = abstract_decode(
        deepseek_r1(), schedule, table, mesh, requests, context, capacity=capacity
    )
    fn = on_every_rank(step.fn, mesh, step.in_specs, step.out_specs, abstract=True)
    jaxpr = jax.make_jaxpr(fn)(*step.args)
    assert jaxpr.out_avals[0].shape == (320, microbatches * requests, 2)
    text = str(jaxpr)
    assert text.count("cm_dispatch") == 2 * microbatches  # one MoE stack and the MTP layer
    assert "320*c" in text
    parameters = sum(np.prod(x.shape, dtype=float) for x in jax.tree.leaves(step.args[0]))
    # every expert slot of every layer counts, and the rest once
    assert 0.75e12 < parameters < 0.9e12


def test_prefill_traces_with_sequence_parallel_attention():
    sequences, prompt, capacity = export.symbolic_shape("s, p, c")
    mesh = RankMesh(2, 8, 2)
    schedule = Schedule(microbatches=2, order="stage")
    table = ep_table(256, 32, redundant=32)
    step = abstract_prefill(
        deepseek_r1(), schedule, table, mesh, sequences, prompt, capacity=capacity
    )
    fn = on_every_rank(step.fn, mesh, step.in_specs, step.out_specs, abstract=True)
    jaxpr = jax.make_jaxpr(fn)(*step.args)
    assert "bf16[32*s,p,2112]" in str(jaxpr)  # the gathered latents
    assert jaxpr.out_avals[1].shape == (32, 2 * sequences, 129280)


def test_blocks_are_marked_with_their_scopes_and_streams():
    mesh = RankMesh(2, 4)
    step = abstract_decode(CONFIG, two_stream_decode(), TABLE, mesh, 2, 8)
    fn = on_every_rank(step.fn, mesh, step.in_specs, step.out_specs, abstract=True)
    stacks = set()

    def walk(jaxpr, outer=""):
        for eqn in jaxpr.eqns:
            path = f"{outer}/{eqn.source_info.name_stack}"
            stacks.add(path)
            for inner in jax.tree.leaves(
                list(eqn.params.values()),
                is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner, path)

    walk(jax.make_jaxpr(fn)(*step.args).jaxpr)
    parts = {part for path in stacks for part in path.split("/")}
    assert {"attention", "prolog", "core", "output", "router", "dispatch", "experts"} <= parts
    assert {"combine", "shared", "dense_ffn", "embed", "lm_head", "sample", "mtp"} <= parts
    assert {"stream=attention,cube=16,vector=32", "stream=moe,cube=8,vector=16"} <= parts
