"""Plans: what is read, what is refused, and in which words."""

import pytest

from cmjax.models.dense import preset
from cmjax.parallelism import Plan, parse_plan


def test_a_plan_is_read_back_from_its_own_text():
    plan = Plan(data=4, tensor=2, pipeline=8, schedule="interleaved", interleave=2, overlap=True)
    assert parse_plan(str(plan)) == plan


@pytest.mark.parametrize(
    "text, layers",
    [("15-16-16-17", (15, 16, 16, 17)), ("15-16x2-17", (15, 16, 16, 17)), ("even", ())],
)
def test_layers_of_stages_are_read_and_written(text, layers):
    plan = parse_plan(f"pipeline=4,layers={text}")
    assert plan.layers == layers
    assert parse_plan(str(plan)) == plan
    assert plan.to_dict()["layers"] == ("15-16x2-17" if layers else "even")


def test_stages_are_as_even_as_pangu_alphas_code_makes_them():
    """Layer i of n is on stage floor(i p / n)."""
    for n, p in ((64, 16), (64, 7), (5, 3), (61, 16)):
        on = [i * p // n for i in range(n)]
        assert Plan(pipeline=p).stages(n) == tuple(on.count(stage) for stage in range(p))


def test_what_stages_recompute_is_of_their_own_layers():
    plan = parse_plan("pipeline=3,layers=1-3-2,recompute=full:1-2-0/selective:0-1-2")
    assert [(n.layers, n.full, n.selective) for n in plan.counts(6)] == [
        (1, 1, 0), (3, 2, 1), (2, 0, 2),
    ]  # fmt: skip
    full = parse_plan("pipeline=3,layers=1-3-2,recompute=full")
    assert [(n.layers, n.full) for n in full.counts(6)] == [(1, 1), (3, 3), (2, 2)]


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
        ("pipeline=2,layers=1-", "layers takes numbers for every stage as 15-16-16-17"),
        ("pipeline=2,layers=1.5-2", "layers takes numbers for every stage"),
        ("pipeline=2,layers=", "layers takes numbers for every stage .* got ''"),
        ("pipeline=2,layers=4x0", "layers takes numbers for every stage"),
        ("pipeline=2,layers=2x9999999999", "layers takes numbers for every stage"),
        ("pipeline=2,layers=4-0", "layers must be at least 1 on every stage, got 4-0"),
        ("pipeline=2,layers=1-2-3", "layers=1-2-3 has 3 numbers; one for each of the pipeline=2"),
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
        ("pipeline=65", "pipeline=65 is more than the 64 layers"),
        ("pipeline=16,interleave=8", "pipeline=16 x interleave=8 is more than the 64 layers"),
        ("pipeline=4,interleave=3", "interleave=3 does not divide the 64 layers"),
        ("pipeline=4,layers=16x3-15", "layers=16x3-15 makes 63; the model has 64"),
        ("pipeline=2,interleave=2,layers=15-16", "in each of 2 chunks makes 62; the model has 64"),
        (
            "pipeline=2,layers=1-63,recompute=full:2",
            "names 2 layers of stage 0",
        ),
        ("data=3", "does not divide the global batch of 512"),
        ("pipeline=16,interleave=2,data=512", "micro-batches in multiples of pipeline=16"),
    ],
)
def test_degrees_that_do_not_divide_are_named(text, says):
    with pytest.raises(ValueError, match=says):
        parse_plan(text).check(preset("pangu-200b"), 512)
