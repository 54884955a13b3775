"""A search over deployments: every row is a prediction, and nothing beats the front."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rich.console import Console

import cmjax
from cmjax import report

OPTIONS = {"phase": "decode", "ep": [8, 16], "context": 4096}


@pytest.fixture(scope="module")
def found():
    return cmjax.search("tiny", slo_tpot_ms=20, **OPTIONS)


def test_rows_are_predictions(found):
    for row in np.linspace(0, len(found.batch) - 1, 5).astype(int):
        one = cmjax.predict(
            found.deployments[found.choice[row]], context=4096, batch=float(found.batch[row])
        )
        assert found.latency_s[row] == pytest.approx(float(one.tpot_s), rel=1e-4)
        assert found.tokens_per_s_per_npu[row] == pytest.approx(
            float(one.tokens_per_s_per_npu), rel=1e-4
        )
        assert found.memory_bytes[row] == pytest.approx(sum(one.memory_bytes.values()))


def test_the_best_has_most_throughput_within_the_limit(found):
    most = found.tokens_per_s_per_npu[found.latency_s <= 0.020].max()
    assert float(found.best.tokens_per_s_per_npu) == pytest.approx(most, rel=1e-4)
    assert float(found.best.tpot_s) <= 0.020 * (1 + 1e-4)


def test_no_row_beats_the_front(found):
    front = set(found.pareto().tolist())
    for row in range(len(found.batch)):
        beaten = (found.latency_s <= found.latency_s[row]) & (
            found.tokens_per_s_per_npu > found.tokens_per_s_per_npu[row]
        )
        assert not (row in front and beaten.any())
    latency, throughput = found.latency_s, found.tokens_per_s_per_npu
    order = np.array(found.pareto())
    assert (np.diff(latency[order]) > 0).all() and (np.diff(throughput[order]) > 0).all()
    assert throughput.argmax() in front


def test_formats_are_varied_where_they_are_listed():
    found = cmjax.search("tiny", quant=["int8", "bf16"], microbatches=[1], **OPTIONS)
    tried = {(d.npus, d.quant, d.microbatches) for d in found.deployments}
    assert tried == {(n, q, 1) for n in (4, 8) for q in ("int8", "bf16")}


def test_what_is_varied_beside_the_usual_has_a_column():
    found = cmjax.search("tiny", redundant=[0, 8], microbatches=[1], **OPTIONS)
    assert {d.redundant for d in found.deployments} == {0, 8}
    result = found.to_dict()
    assert {row["redundant"] for row in result["pareto"]} <= {0, 8}
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(report.search_table(result))
    text = console.export_text()
    assert "redundant" in text and "drafts" not in text and "engine" not in text


def test_an_uneven_load_is_searched_as_it_is_predicted(found):
    uneven = cmjax.search("tiny", load=2.0, **OPTIONS)
    one = cmjax.predict(
        uneven.deployments[uneven.choice[-1]], context=4096, batch=float(uneven.batch[-1]), load=2.0
    )
    assert uneven.latency_s[-1] == pytest.approx(float(one.tpot_s), rel=1e-4)
    assert uneven.latency_s.max() > 1.2 * found.latency_s.max()


def test_an_executor_gives_the_same_rows(found):
    with ThreadPoolExecutor(2) as executor:
        other = cmjax.search("tiny", slo_tpot_ms=20, executor=executor, **OPTIONS)
    np.testing.assert_array_equal(other.latency_s, found.latency_s)
    np.testing.assert_array_equal(other.choice, found.choice)


def test_prefill_is_limited_by_its_time_to_first_token():
    found = cmjax.search("tiny", phase="prefill", ep=[8], prompt=1024, slo_ttft_ms=50)
    assert float(found.best.ttft_s) <= 0.050
    assert set(found.to_dict()["pareto"][0]) >= {"ttft_ms", "ep", "batch", "tokens_per_s_per_npu"}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"slo_tpot_ms": 1e-3},
            "no deployment keeps 0.001 ms: the fastest takes",
        ),
        ({"slo_ttft_ms": 100}, "slo-ttft-ms does not apply to decode"),
        ({"slo_tpot_ms": float("nan")}, "the limit on latency must be positive, got nan ms"),
        ({"batch": 8}, "every batch is tried; leave batch out"),
        ({"ep": [7]}, r"ep must be a multiple of 2 .* up to 768, got 7"),
        ({"load": 0.5}, "^load must be at least 1, got 0.5"),
        ({"quant": ["int3"]}, "quant must be int8 or"),
        ({"quand": ["int8"]}, "unknown option 'quand'; it takes quant"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cmjax.search("tiny", **(OPTIONS | options))
