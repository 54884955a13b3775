"""What is recomputed, layer by layer: how it is written, read, counted and refused."""

import numpy as np
import pytest

from cmjax.models.dense import preset
from cmjax.parallelism import Plan, parse_plan
from cmjax.parallelism.layerwise import Counts, Layerwise, parse_layerwise, shortest


@pytest.mark.parametrize(
    "text", ["full:2", "selective:1-2x3", "full:2-1-0x2/selective:1-2-3x2", "full:0"]
)
def test_layerwise_is_read_back_from_its_own_text(text):
    assert str(parse_layerwise(text)) == text
    plan = parse_plan(f"pipeline=4,recompute={text}")
    assert parse_plan(str(plan)) == plan
    assert plan.to_dict()["recompute"] == text


def test_the_first_layers_of_a_chunk_are_recomputed_whole_the_next_ones_in_part():
    counts = Layerwise(full=(2, 0), selective=(1,)).of(0, 4)
    assert [counts.mode_of(i) for i in range(4)] == ["full", "full", "selective", "none"]
    assert counts.by_mode == {"none": 1, "selective": 1, "full": 2}
    assert counts.last == {"none": True}


def test_counts_of_many_choices_are_those_of_each():
    full, some = np.array([0, 2, 3, 1]), np.array([0, 1, 0, 1])
    many = Counts(3, full, some)
    for i, (f, s) in enumerate(zip(full, some, strict=True)):
        one = Counts(3, int(f), int(s))
        assert {m: n[i] for m, n in many.by_mode.items() if n[i]} == one.by_mode
        assert {m: n[i] for m, n in many.last.items() if n[i]} == one.last
        assert one.last == {one.mode_of(2): 1}


def test_what_all_layers_are_is_said_in_one_word():
    assert shortest([Counts(3, 3, 0), Counts(3, 3, 0)]) == "full"
    assert shortest([Counts(3, 0, 0)]) == "none"
    assert shortest([Counts(3, 1, 2), Counts(3, 0, 2)]) == Layerwise(full=(1, 0), selective=(2,))


@pytest.mark.parametrize(
    "text, says",
    [
        ("full:x", r"takes numbers of layers as full:2 .* got 'full:x'"),
        ("some:2", "takes numbers of layers"),
        ("full:1/full:2", "takes numbers of layers"),
        ("full:1-", "takes numbers of layers"),
    ],
)
def test_another_form_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_plan(f"recompute={text}")


@pytest.mark.parametrize(
    "text, says",
    [
        ("full:1-2", "has 2 numbers of full layers; one for each of the 16 stages"),
        ("full:3/selective:2", "names 5 layers of stage 0, whose chunks have 4"),
    ],
)
def test_numbers_that_do_not_go_with_the_stages_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_plan(f"pipeline=16,recompute={text}").check(preset("pangu-200b"), 512)


def test_a_mixture_of_experts_refuses_to_go_layer_by_layer():
    plan = Plan(recompute=Layerwise(full=(1,)))
    with pytest.raises(ValueError, match="recompute=full:1 goes layer by layer"):
        _ = plan.recompute_of_all
