"""Tables: numbers with units, blocks rolled up, warnings that cannot be overlooked."""

import io

import numpy as np
import pytest
from rich.console import Console

from cmjax.cost.fit import Calibration, Residual
from cmjax.cost.measured import Measurement
from cmjax.deploy.validation import ValidationRow, summary
from cmjax.hardware import Uncertainty, load_machine
from cmjax.placement import BASELINES, Judge, Problem, Risk, Routes, Score, compare
from cmjax.report import (
    block_of,
    comparison_table,
    placement_table,
    prediction_table,
    residual_table,
    roll_up,
    sensitivity_table,
    validation_table,
)
from cmjax.report.units import number, percent, quantity


def shown(renderable) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize(
    "scope, block",
    [
        ("attention/output/QuantMatmul", "attention"),
        ("microbatch1/router/Gate", "router"),
        ("mtp/attention/core", "mtp"),
        ("RMSNorm", "other"),
        ("", "other"),
    ],
)
def test_a_scope_belongs_to_the_block_at_its_top(scope, block):
    assert block_of(scope) == block


def test_rolling_up_loses_no_time_and_keeps_the_order_of_the_step():
    breakdown = {"combine": 1.0, "attention/core": 2.0, "attention": 0.5, "strange": 0.25}
    blocks = roll_up(breakdown)
    assert blocks == {"attention": 2.5, "combine": 1.0, "other": 0.25}
    assert list(blocks) == ["attention", "combine", "other"]


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("tpot_ms", 46.569, "46.6 ms"),
        ("per_layer_us", 1168.9, "1,169 µs"),
        ("tokens_per_s_per_npu", 2061.45, "2,061 tokens/s per NPU"),
        ("utilization", 0.8158, "81.6 %"),
        ("gb_per_s", 1346.0, "1,346 GB/s"),
        ("us", 9.996, "10.0 µs"),
        ("us", 99.96, "100 µs"),
        ("count", 3.0, "3.00"),
        ("ms", 0.0004, "4.00e-04 ms"),
    ],
)
def test_a_quantity_has_the_unit_its_key_names(key, value, text):
    assert quantity(key, value) == text


def test_signs_and_zero():
    assert percent(-0.057, sign=True) == "−5.7 %"
    assert percent(0.057, sign=True) == "+5.7 %"
    assert number(0) == "0"


def test_a_prediction_shows_headlines_blocks_and_memory(result):
    text = shown(prediction_table(result))
    assert "deepseek-r1 decode on 160 NPUs of cloudmatrix384" in text
    assert quantity("tpot_ms", result["tpot_ms"]) in text
    assert "2,061 tokens/s per NPU" in text
    for name in ("attention", "experts", "LM head"):
        assert name in text
    share = roll_up(result["breakdown"])["attention"] / result["step_ms"]
    assert percent(share) in text
    assert "cube 50 %, HBM 25 %" in text
    assert "35.6 GB per die (weights 20.7 + caches 14.9): fits" in text
    assert "streams overlap" in text


def test_a_prediction_that_does_not_fit_says_so(result):
    text = shown(prediction_table(result | {"fits_hbm": False}))
    assert "DOES NOT FIT: 35.6 GB per die" in text
    assert ": fits" not in text


def test_validation_lists_predictions_first_and_sums_up_each_role():
    rows = [
        ValidationRow("GEMM", "calibrate", 0.8, 0.774, "paper", "utilization"),
        ValidationRow("TPOT", "predict", 46.6, 49.4, "paper", "tpot_ms"),
        ValidationRow("layer", "predict", 1320, 1200, "paper", "per_layer_us"),
    ]
    found = summary(rows)["predict"]
    assert (found.rows, found.worst_row) == (2, "layer")
    assert found.mean_error == pytest.approx((0.1 + 2.8 / 49.4) / 2)
    assert found.worst_error == pytest.approx(0.1)
    text = shown(validation_table(rows))
    assert text.index("TPOT") < text.index("GEMM")
    assert "−5.7 %" in text and "+10.0 %" in text
    assert "predict: 2 rows, mean error 7.8 %, worst 10.0 % (layer)" in text


def test_a_measurement_of_nothing_is_refused():
    with pytest.raises(ValueError, match="'TPOT': measured must be positive, got 0"):
        ValidationRow("TPOT", "predict", 46.6, 0.0, "paper", "tpot_ms")


def test_residuals_show_constants_and_errors():
    row = Measurement("dispatch EP8", "calibrate", ("micro", "dispatch"), "us", 116.0, "paper")
    fit = Calibration(
        load_machine("cloudmatrix384"),
        {"exchange.dispatch_startup_s": 88e-6, "efficiency.gemm": 0.8158},
        Uncertainty(("exchange.dispatch_startup_s", "efficiency.gemm"), 1e-4 * np.eye(2)),
        np.array([0.6, 0.1]),
        (Residual(row, 120.0),),
        {},
    )
    text = shown(residual_table(fit))
    assert "88.0 µs" in text and "81.6 %" in text
    assert "1.0 %" in text and "60.0 %" in text  # how sure after and before
    assert "120 µs" in text and "116 µs" in text and "+3.4 %" in text


def test_placements_are_compared_and_the_fastest_is_marked():
    def evaluation(par, time_s):
        return Score(
            par=np.array([[par]]), time_s=np.array([time_s]), lower_bound_s=np.array([1e-3])
        )

    text = shown(
        placement_table({"contiguous": evaluation(2.5, 2e-3), "greedy": evaluation(1.1, 1.05e-3)})
    )
    assert "greedy ◀ fastest" in text and "contiguous ◀" not in text
    assert "2.500" in text and "+100.0 %" in text and "+5.0 %" in text


def test_a_comparison_with_all_there_is_to_say_fits_in_80_columns():
    routes = Routes(np.random.default_rng(0).random((200, 2, 16)).argsort(-1)[..., :4], 16)
    problem = Problem(routes.loads(2).scaled(8e5), 8, 8, nodes=2, objective=Risk("quantile", 0.75))
    judge = Judge(
        problem, lambda tokens: 1e-5 * tokens.max(-1),
        test=routes.loads(), routes=routes, step_assignments=100,
    )  # fmt: skip
    scores = compare(judge, BASELINES).scores
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(scores, "quantile:0.75"))
    text = console.export_text()
    assert "…" not in text and all(len(line.rstrip()) <= 80 for line in text.splitlines())
    for name in BASELINES:
        assert text.count(f" {name} ") == 2  # where it planned, and where not
    for word in ("quantile:0.75", "nodes/", "step", "solved", "not planned for"):
        assert word in " ".join(text.split())


def test_sensitivities_come_strongest_first():
    text = shown(sensitivity_table({"latency_s": 0.1, "cube_flops": -0.5, "tiny": 1e-6}))
    assert text.index("cube_flops") < text.index("latency_s")
    assert "−0.500 %" in text and "+0.100 %" in text
    assert "tiny" not in text and "left out: 1" in " ".join(text.split())
    assert shown(sensitivity_table({}))
