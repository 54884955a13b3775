"""Plans: what is read, what is refused, and in which words."""

import pytest

from cmjax.models.dense import preset
from cmjax.parallelism import Plan, parse_plan


def test_a_plan_is_read_back_from_its_own_text():
    plan = Plan(data=4, tensor=2, pipeline=8, schedule="interleaved", interleave=2, overlap=True)
    assert parse_plan(str(plan)) == plan


def test_megatrons_name_for_interleaving_is_understood():
    assert parse_plan("pipeline=8,schedule=1f1b,interleave=6").schedule == "interleaved"


@pytest.mark.parametrize(
    "text, says",
    [
        ("tensr=2", "unknown name 'tensr'; closest: tensor"),
        ("tensor", "expected name=value"),
        ("tensor=0", "tensor must be a whole number >= 1, got '0'"),
        ("tensor=2,tensor=2", "tensor is given twice"),
        ("recompute=some", "recompute must be one of none, selective, full"),
        ("overlap=maybe", "overlap must be true or false"),
        ("order=data-tensor", "order must name tensor, pipeline, data once each"),
        ("schedule=gpipe,pipeline=4,interleave=2", "does not go with interleave=2"),
    ],
)
def test_what_is_no_plan_is_refused_in_one_line(text, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")) as refused:
        parse_plan(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("tensor=3", "tensor=3 must divide the 128 heads"),
        ("pipeline=7", "does not divide the 64 layers"),
        ("data=3", "does not divide the global batch of 512"),
        ("pipeline=16,interleave=2,data=512", "micro-batches in multiples of pipeline=16"),
    ],
)
def test_degrees_that_do_not_divide_are_named(text, says):
    with pytest.raises(ValueError, match=says):
        parse_plan(text).check(preset("pangu-200b"), 512)
