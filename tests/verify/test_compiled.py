"""Bytes read from HLO: every form of its groups, loops, and what cannot be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from cmjax.verify.compiled import device_bytes

HLO = """HloModule m

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  {instruction}
}}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {{
  %while.1 = (s32[], f32[8,4]) while(%t), condition=%c, body=%body{trips}
}}
"""
TRIPS = ', backend_config={"known_trip_count":{"n":"5"}}'


def _hlo(instruction, trips=TRIPS):
    return HLO.format(instruction=instruction, trips=trips)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3}}", 4),
        ("{{0,1},{2,3}}", 2),
        ("[2,2]<=[4]", 2),
        ("[2,2]<=[2,2]T(1,0)", 2),
        ("mesh['node'=4] {'node'}", 4),
        ("mesh['node'=2,'npu'=2] {'npu'}", 2),
        ("{}", 4),
    ],
)
def test_an_all_to_all_in_a_loop_counts_every_iteration(groups, size):
    line = f"%x = f32[8,4]{{1,0}} all-to-all(%a), replica_groups={groups}, dimensions={{0}}"
    assert device_bytes(_hlo(line), 4) == 5 * 4 * (8 * 4 * 4) * (size - 1) // size


def test_tuples_and_narrow_types_count_their_bytes():
    line = "%x = (s8[6], bf16[3,2]) all-to-all(%a, %b), replica_groups={{0,1}}"
    assert device_bytes(_hlo(line), 2) == 5 * 2 * (6 + 12) // 2


def test_a_permutation_counts_the_pairs_that_differ():
    line = "%x = f32[2] collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,2}}"
    assert device_bytes(_hlo(line), 3) == 5 * 8 * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "found no ENTRY"),
        (_hlo("%x = f32[8] all-reduce(%a), replica_groups={{0,1}}"), "all-reduce has no one"),
        (_hlo("%x = f32[8] all-gather(%a), replica_groups={{0,1}}", ""), "loop of unknown length"),
        (_hlo("%x = f32[8] all-gather(%a), replica_groups=?"), "cannot read the groups"),
    ],
)
def test_what_cannot_be_counted_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        device_bytes(text, 2)


def test_a_compiled_program_of_eight_devices():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def fn(x):
        x = lax.fori_loop(0, 3, lambda _, x: lax.all_to_all(x, "a", 0, 0, tiled=True) + 1, x)
        return lax.all_gather(x, "b", axis=0, tiled=True)

    spec = PartitionSpec(("a", "b"))
    lifted = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(lifted).lower(jnp.asarray(np.ones((32, 6), np.float32))).compile().as_text()
    each = 4 * 6 * 4  # bytes of a device's block
    assert device_bytes(text, 8) == 3 * 8 * each * 3 // 4 + 8 * each
