"""What the study of int8 Winograd says, at a smaller size."""

import math

import pytest
from rich.console import Console

from cmjax.primitives.convolution.toom_cook import ALGORITHMS
from studies.winograd import Study, learn_steps, plot_accuracy, run
from studies.winograd_pipelines import (
    SIGNALS,
    Sizes,
    pipeline_sqnr_db,
    random_filter,
    signal,
)

SMALL = Sizes(cin=128, cout=32, length=602)


def _reached(pipelines, algorithm, kind="Gaussian", sizes=SMALL):
    x, w = signal(kind, sizes), random_filter(ALGORITHMS[algorithm].r, sizes)
    return [pipeline_sqnr_db(name, algorithm, x, w) for name in pipelines]


@pytest.mark.parametrize("algorithm", ["F(2,3)", "F(4,3)-lavin", "F(2,5)", "F(4,5)"])
def test_the_loss_of_per_point_steps_is_the_closed_form(algorithm):
    direct, per_point = _reached(("P0", "P3"), algorithm, sizes=Sizes())
    form = ALGORITHMS[algorithm]
    assert direct - per_point == pytest.approx(10 * math.log10(form.amplification(form.r)), abs=0.8)


def test_one_step_for_all_points_ruins_large_tiles_and_a_step_per_point_does_not():
    one, per_point = _reached(("P2", "P3"), "F(6,3)")
    assert one < 3 < 24 < per_point


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIGNALS)
def test_pipelines_keep_their_order(kind):
    direct, per_point, integer, shift, safe, ranged, exact = _reached(
        ("P0", "P3", "P5", "P9", "P6", "P7", "P8"), "F(2,5)-lavin", kind
    )
    assert direct >= per_point >= integer >= shift
    assert ranged >= safe
    assert exact == pytest.approx(direct, abs=0.1)


def test_a_split_filter_is_more_accurate_than_a_large_tile_of_the_same_saving():
    (large,), (split,) = _reached(("P3",), "F(2,5)"), _reached(("P3",), "F(3,3)+F(3,2)")
    assert ALGORITHMS["F(2,5)"].saving(5) == ALGORITHMS["F(3,3)+F(3,2)"].saving(5)
    assert split > large + 1.5


def test_learning_widens_the_step_where_transforms_saturate_and_wins_back_3_db():
    learned = learn_steps("F(2,3)", 110)
    assert learned.input_step_ratio > 1.1
    assert learned.learned_db - learned.calibrated_db > 3


def test_the_picture_is_written_and_bad_options_are_refused(tmp_path):
    plot_accuracy(tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"no algorithm F\(9,9\); there are direct"):
        run(Study(out=tmp_path, algorithms=("F(9,9)",)), Console(quiet=True))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        run(Study(out=tmp_path, steps=0), Console(quiet=True))
