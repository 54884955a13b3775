"""What does not fit is refused before it is made, with bytes; prompts are cut where that helps."""

import dataclasses

import pytest

from cmjax.mesh import RankMesh
from cmjax.models.moe.generation import memory
from cmjax.models.moe.generation.memory import (
    check_memory,
    chunk_that_fits,
    exchange_bytes,
    parameter_bytes,
)
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.presets import deepseek_r1, tiny
from cmjax.models.moe.slots import ep_table

PARALLELISM = Parallelism(table=ep_table(16, 8, redundant=8), axes=("node", "npu"))


def test_a_model_that_cannot_fit_is_refused_before_it_is_made():
    config = deepseek_r1()
    with pytest.raises(ValueError, match=r"take 2,\d{3}\.\d GB on 1 ranks in float32, this"):
        check_memory(config, one_rank(config), RankMesh(1, 1), "float32", False)


def test_a_model_that_is_too_large_says_by_how_much_and_what_would_fit(monkeypatch):
    config = tiny()
    at = (config, one_rank(config), RankMesh(1, 1))
    wide, half, steps = (
        10**4 * parameter_bytes(*at, precision, False)
        for precision in ("float32", "bfloat16", "int8")
    )
    monkeypatch.setattr(memory, "parameter_bytes", lambda *a: 10**4 * parameter_bytes(*a))

    def check(there, precision="float32"):
        monkeypatch.setattr(memory, "_machine_bytes", lambda: there)
        check_memory(*at, precision, False)

    check(wide)
    check(half, "bfloat16")
    both = rf"bfloat16 takes {half / 1e9:,.1f} GB and int8 takes {steps / 1e9:,.1f} GB$"
    with pytest.raises(ValueError, match=rf"GB, {(wide - half) / 1e9:,.1f} GB too few; {both}"):
        check(half)
    with pytest.raises(ValueError, match=rf"too few; int8 takes {steps / 1e9:,.1f} GB$"):
        check(steps)
    with pytest.raises(ValueError, match="choose a smaller model, mesh or precision"):
        check(steps - 1)


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    limit, none = tmp_path / "memory.max", tmp_path / "unlimited"
    limit.write_text("123456\n")
    none.write_text("max\n")
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (none, tmp_path / "absent"))
    whole = memory._machine_bytes()
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (limit, none))
    assert memory._machine_bytes() == 123456 < whole


def test_exchange_buffers_grow_with_ranks_slots_and_tokens():
    # per row: 64 values sent, 64 received, 2 x 32 in the SwiGLU and 32 out of it, float32
    assert exchange_bytes(tiny(), PARALLELISM, 5) == 8 * 24 * 5 * (64 + 64 + 96) * 4


def test_sorted_rows_are_as_many_as_copies_of_tokens_whatever_the_experts_are():
    alone = dataclasses.replace(one_rank(tiny()), sort_rows=True)
    copies = 5 * tiny().experts_per_token
    assert exchange_bytes(tiny(), alone, 5) == copies * (64 + 64 + 96) * 4
    device = dataclasses.replace(PARALLELISM, sort_rows=True)
    assert exchange_bytes(tiny(), device, 5) == 8 * copies * (64 + 64 + 96) * 4
    blocks = dataclasses.replace(alone, sort_rows=False)
    assert exchange_bytes(tiny(), blocks, 5) == 5 * tiny().routed_experts * (64 + 64 + 96) * 4


@pytest.mark.parametrize(("room", "chunk"), [(16, None), (15.9, 8), (8, 8), (7.9, 4), (1, 1)])
def test_a_chunk_is_the_largest_power_of_two_that_fits(monkeypatch, room, chunk):
    each = exchange_bytes(tiny(), PARALLELISM, 3)
    monkeypatch.setattr(
        memory, "_machine_bytes", lambda: room * each / memory._EXCHANGE_FRACTION + 1
    )
    assert chunk_that_fits(tiny(), PARALLELISM, 3, 16) == chunk


def test_a_single_token_that_does_not_fit_is_refused_with_the_bytes(monkeypatch):
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 10**6)
    with pytest.raises(ValueError, match=r"3 request\(s\) on each of 8 ranks takes 0\.0 GB, 0\.0"):
        chunk_that_fits(tiny(), PARALLELISM, 3, 16)
