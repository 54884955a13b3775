"""`cmjax serve` and `cmjax plan`: what they write, and one line for bad input."""

import json

import pytest

from cmjax.cli import main

SMALL = """
model = "tiny"
[prefill]
npus = 4
instances = 2
[decode]
npus = 4
batch = 8
[cache]
blocks = 500
"""
TRACE = "poisson:requests=60,rate=20,prompt=2048,output=30,reuse=0.5"


@pytest.fixture
def service(tmp_path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def test_serve_writes_everything_that_it_is_asked_for(service, tmp_path, capsys):
    page, requests, trace = (tmp_path / name for name in ("p.html", "r.csv", "t.json"))
    code = main([
        "serve", TRACE, "--deployment", service, "--slo-ttft-ms", "500", "--slo-tpot-ms", "50",
        "--html", str(page), "--per-request", str(requests), "--perfetto", str(trace),
        "--uncertainty", "0.1", "--json", str(tmp_path / "result.json"),
    ])  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0 and "stable" in shown and "TTFT" in shown and "p99 between" in shown
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 60 and result["slo_attainment"] == 1.0
    assert len(requests.read_text().splitlines()) == 61
    assert json.loads(trace.read_text())["traceEvents"]
    assert page.read_text().count("data:image/svg") == 2


def test_json_on_standard_output_is_nothing_but_json(service, capsys):
    assert main(["serve", TRACE, "--deployment", service, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 60


def test_a_measured_run_is_shown_beside_its_simulation(data, capsys):
    folder = data / "serving_vllm_measured/RTX4090_Llama-3.1-8B"
    code = main([
        "serve", str(folder / "requests.jsonl"), "--profile", str(folder / "kernel_profile_tp1"),
        "--layers", "32", "--max-requests", "256", "--kv-tokens", "41408", "--json", "-",
    ])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert code == 0 and abs(result["measured"]["ttft_mean_ms"]["error"]) < 0.006  # as published


def test_plan_prints_a_split_and_what_limits_it(service, tmp_path, capsys):
    code = main([
        "plan", TRACE, "--npus", "16", "--slo-ttft-ms", "500", "--slo-tpot-ms", "50",
        "--deployment", service, "--prefill-npus", "4", "--decode-npus", "4", "--workers", "1",
        "--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.svg"),
    ])  # fmt: skip
    assert code == 0 and "limited by" in capsys.readouterr().out
    result = json.loads((tmp_path / "plan.json").read_text())
    best = result["prefill_instances"] * 4 + result["decode_instances"] * 4
    assert best <= 16 and result["goodput_requests_per_s"] > 0
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["serve", "nowhere.jsonl"], "nowhere.jsonl: no such trace file"),
        (["serve", TRACE, "--deployment", "nowhere"], "nowhere: no such deployment"),
        (["serve", TRACE, "--npus", "100"], "use 176 or more"),
        (["serve", TRACE, "--npus", "800"], "more than the 384 of cloudmatrix384"),
        (["serve", TRACE, "--slo-tpot-ms", "0.1"], "slo-tpot-ms 0.1 cannot be met"),
        (["serve", TRACE, "--per-request", "r.txt"], "requests are written as .csv or .parquet"),
        (["serve", TRACE, "--html", "/nowhere/p.html"], "/nowhere does not exist"),
        (["serve", TRACE, "--profile", "x", "--deployment", "y"], "does not go with --deployment"),
        (["serve", TRACE, "--calibrate", "x.jsonl"], "no such trace file"),
        (["serve", TRACE, "--calibrate-requests", "5"], "--calibrate-requests belongs to --calibr"),
        (["plan", TRACE], "plan needs an SLO"),
        (["plan", TRACE, "--slo-tpot-ms", "50", "--workers", "0"], "workers must be at least 1"),
        (
            ["plan", TRACE, "--slo-tpot-ms", "50", "--scheduler", "tcp://127.0.0.1:1"],
            "nobody answers",
        ),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
