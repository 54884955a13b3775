"""The command line as a user meets it: results on stdout, one line and exit code 2 on bad input."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from cmjax.cli import main
from cmjax.hardware import load_machine
from cmjax.placement import METHODS

DECODE = ["predict", "decode", "--batch", "96", "--microbatches", "1"]


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def loads(tmp_path):
    counts = np.random.default_rng(0).integers(1, 1000, size=(3, 16))
    path = tmp_path / "loads.npy"
    np.save(path, counts)
    return path


def test_predict_decode_reports_every_promised_key(capsys):
    result = run_json(capsys, *DECODE)
    promised = "step_ms tpot_ms tokens_per_s_per_npu per_layer_us breakdown calibration".split()
    assert set(promised) <= set(result)
    assert result["tpot_ms"] == pytest.approx(result["step_ms"] / 1.7)
    assert result["tokens_per_s_per_npu"] == pytest.approx(96 / result["tpot_ms"] * 1e3)


def test_predict_prefill_reports_ttft_and_defaults_to_16384_tokens(capsys):
    result = run_json(capsys, "predict", "prefill", "--microbatches", "1", "--prompt", "8192")
    assert result["requests"]["batch"] == 2
    assert result["tokens_per_s_per_npu"] == pytest.approx(16384 / result["ttft_ms"] * 1e3)


def test_predict_without_mtp_emits_one_token_a_step(capsys):
    result = run_json(capsys, *DECODE, "--no-mtp")
    assert result["tpot_ms"] == pytest.approx(result["step_ms"])


def test_slo_search_keeps_the_slo_with_the_largest_batch(capsys):
    at = run_json(capsys, *DECODE[:2], "--microbatches", "1", "--slo-tpot-ms", "30")
    assert at["tpot_ms"] <= 30
    batch = int(at["requests"]["batch"]) + 2
    above = run_json(capsys, *DECODE[:2], "--microbatches", "1", "--batch", str(batch))
    assert above["tpot_ms"] > 30


def test_price_takes_any_annotated_function(capsys, tmp_path, monkeypatch):
    (tmp_path / "user_steps.py").write_text(
        "import jax.numpy as jnp\n"
        "from jaxtyping import Array, BFloat16\n\n"
        'def project(x: BFloat16[Array, "tokens 4096"], w: BFloat16[Array, "4096 4096"]):\n'
        "    return x @ w\n"
    )
    monkeypatch.chdir(tmp_path)
    result = run_json(capsys, "price", "user_steps:project", "--size", "tokens=8192")
    assert result["work"]["flops"] == 2 * 8192 * 4096 * 4096
    machine = load_machine("cloudmatrix384")
    cube_s = result["work"]["flops"] / machine.chip.cube_flops_16bit / machine.efficiency.gemm
    assert result["engines_busy_ms"]["cube"] == pytest.approx(cube_s * 1e3, rel=1e-5)


def test_price_writes_a_trace_that_perfetto_can_read(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    arguments = ["price", "cmjax.deploy:decode_step", "--size", "batch=96"]
    assert main([*arguments, "--size", "context=4096", "--trace", str(trace)]) == 0
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert {"attention/core", "dispatch"} <= {e["cat"].partition("/microbatch")[0] for e in events}


def test_micro_reports_time_and_rate(capsys):
    result = run_json(capsys, "micro", "dispatch", "--ep", "8", "--tokens", "128")
    assert 50 < result["us"] < 300


def test_machines_lists_a_source_for_every_number(capsys):
    sources = run_json(capsys, "machines", "cloudmatrix384")
    assert all(sources.values())
    assert "chip.hbm_bytes_per_s" in sources


def test_a_misspelt_command_is_one_line_with_what_may_be_meant(capsys):
    assert main(["predcit", "decode"]) == 2
    assert (
        capsys.readouterr().err == "error: no command 'predcit'; perhaps predict? (cmjax --help)\n"
    )


def test_the_help_of_place_is_grouped_and_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main(["place", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and all(len(line) <= 80 for line in shown.splitlines())
    groups = ("what to place", "where", "how to search", "how to judge", "output")
    places = [shown.index(f" {group} options ") for group in groups]
    assert places == sorted(places)
    for option in ("LOADS", "--ranks INT", "--method STR", "--evaluate STR", "--json STR"):
        assert option in shown


def test_place_writes_a_plan_that_is_no_worse_than_greedy(capsys, loads):
    result = run_json(
        capsys, "place", str(loads), "--ranks", "8", "--redundant", "8", "--seconds", "5"
    )
    times = {name: score["time_ms"] for name, score in result["evaluation"].items()}
    assert times["search"] <= times["greedy"] * (1 + 1e-9)
    assert times["search"] <= times["contiguous"] * (1 + 1e-9)


def test_place_keeps_its_constraints_and_judges_on_loads_it_has_not_seen(capsys, loads, tmp_path):
    other = tmp_path / "other.npy"
    np.save(other, np.load(loads)[:, ::-1])
    result = run_json(
        capsys, "place", str(loads), "--ranks", "8", "--redundant", "16", "--method", "greedy",
        "--test", str(other), "--without-ranks", "3,5", "--objective", "worst", "--shared", "1",
    )  # fmt: skip
    slots = np.array(result["expert_of_slot"]).reshape(3, 8, -1)
    assert (slots[:, [3, 5]] == -1).all() and (slots == 16).any()
    score = result["evaluation"]["greedy"]
    assert score["test_time_ms"] > score["time_ms"] and score["step_par"] > score["mean_par"]
    assert set(result["evaluation"]) >= {"contiguous", "random", "hierarchical", "one-spare"}


def test_place_improves_a_running_plan_by_no_more_moves_than_given(capsys, loads, tmp_path):
    running = tmp_path / "running.json"
    base = ("place", str(loads), "--ranks", "8", "--redundant", "8", "--seconds", "0")
    assert main([*base, "--method", "contiguous", "--json", str(running)]) == 0
    capsys.readouterr()
    result = run_json(capsys, *base, "--start-from", str(running), "--moves", "9")
    old, new = (
        np.array(plan["expert_of_slot"]).reshape(3, 8, -1)
        for plan in (json.loads(running.read_text()), result)
    )
    moved = sum(
        len(set(b.tolist()) - set(a.tolist()))
        for a, b in zip(old.reshape(-1, 3), new.reshape(-1, 3), strict=True)
    )
    assert 0 < moved <= 9
    scores = result["evaluation"]
    assert scores["search"]["objective_ms"] <= scores["running"]["objective_ms"]


def test_a_migration_budget_in_bytes_is_as_many_experts_as_it_holds(capsys, loads, tmp_path):
    running = tmp_path / "running.json"
    base = ("place", str(loads), "--ranks", "8", "--redundant", "8", "--seconds", "0")
    assert main([*base, "--method", "contiguous", "--json", str(running)]) == 0
    capsys.readouterr()
    expert = 3 * 7168 * 2048  # DeepSeek-R1 in INT8, its scales aside
    found = [
        run_json(capsys, *base, "--start-from", str(running), *budget)["expert_of_slot"]
        for budget in (("--moves", "5"), ("--migration-budget", f"{5.5 * expert / 1e6:.1f}MB"))
    ]
    assert found[0] == found[1]
    assert main([*base, "--start-from", str(running), "--migration-budget", "2 parsecs"]) == 2
    assert "expected bytes such as 2GB or 512MiB" in capsys.readouterr().err


def test_a_running_plan_is_improved_without_a_free_search_beside_it(capsys, loads, tmp_path):
    running = tmp_path / "running.json"
    base = ("place", str(loads), "--ranks", "8", "--redundant", "8", "--seconds", "0")
    assert main([*base, "--method", "greedy", "--json", str(running)]) == 0
    capsys.readouterr()
    calls = []

    def spy(*arguments, **options):
        calls.append(arguments)

    METHODS["search"], kept = spy, METHODS["search"]
    try:
        run_json(capsys, *base, "--start-from", str(running), "--moves", "2")
    finally:
        METHODS["search"] = kept
    assert calls == []


def test_a_kernel_that_sends_a_token_once_per_rank_makes_the_layer_faster(capsys, loads):
    base = ("place", str(loads), "--ranks", "8", "--method", "greedy")
    each, once = (
        run_json(capsys, *base, *flag)["evaluation"]["greedy"]["time_ms"]
        for flag in ((), ("--multicast",))
    )
    assert once < each


@pytest.mark.parametrize("option", [["--seconds", "3"], ["--redundant", "8"], ["--weighted"]])
def test_evaluating_a_plan_refuses_options_of_planning(capsys, loads, tmp_path, option):
    plan = tmp_path / "plan.json"
    base = ("place", str(loads), "--ranks", "8", "--method", "greedy")
    assert main([*base, "--json", str(plan)]) == 0
    capsys.readouterr()
    assert main(["place", str(loads), "--evaluate", str(plan), *option]) == 2
    error = capsys.readouterr().err.strip()
    assert f"would ignore {option[0]}" in error and "\n" not in error


INTERRUPTED = """
import sys
from cmjax.cli import main
from cmjax.placement.methods.search import Incumbent
consider = Incumbent.consider
def spoken(self, plans):
    consider(self, plans)
    print("considered", file=sys.stderr, flush=True)
Incumbent.consider = spoken
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["search", pytest.param("gradient", marks=pytest.mark.slow)])
def test_ctrl_c_gives_the_best_plan_so_far(tmp_path, method):
    counts = np.random.default_rng(0).integers(1, 1000, size=(12, 40, 128))
    np.save(tmp_path / "loads.npy", counts)
    plan = tmp_path / "plan.json"
    command = ["place", str(tmp_path / "loads.npy"), "--ranks", "64", "--redundant", "64",
               "--method", method, "--step-tokens", "0", "--json", str(plan)]  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stderr is not None
    said = 0
    while said < 7:  # the rules, the starting plans, then each chunk
        said += run.stderr.readline().startswith("considered")
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    output, error = run.communicate(timeout=300)
    assert run.returncode == 0, error
    assert error.count("considered") < 16  # chunks that a whole run has
    found = json.loads(plan.read_text())["evaluation"]
    assert found[method]["objective_ms"] <= found["greedy"]["objective_ms"] * (1 + 1e-12)
    assert "Placement" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "median"], "expected mean, worst, quantile:Q or cvar:Q"),
        (["--train-windows", "0:3"], "0 <= A < B <= 1 windows"),
        (["--without-ranks", "8"], "ranks 0 to 7, got 8"),
        (["--without-ranks", "a"], "expected ranks such as 3,17"),
        (["--memory-gib", "0.01"], "slots per rank do not hold 16 experts"),
        (["--shrink", "1.5"], "shrink must lie between 0 and 1, or be auto, got 1.5"),
        (["--shrink", "auto"], "needs 2 or more windows"),
        (["--moves", "3"], "--moves and --migration-budget need --start-from PLAN"),
        (["--migration-budget", "2GB"], "--moves and --migration-budget need --start-from PLAN"),
        (["--start-from", "plan.json"], "goes with one of --moves N and --migration-budget BYTES"),
        (["--seconds", "-1"], "seconds must be at least 0, got -1"),
        (["--seconds", "nan"], "seconds must be a finite number, got nan"),
        (["--memory-gib", "-1"], "memory_gib must be positive, got -1"),
        (["--shared", "9"], "shared must lie in 0 to 8, got 9"),
    ],
)
def test_place_refuses_what_it_cannot_do_in_one_line(capsys, loads, arguments, message):
    assert main(["place", str(loads), "--ranks", "8", "--redundant", "8", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_validate_reads_a_users_csv(capsys, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "row,role,command,key,value,source\n"
        "my dispatch,predict,micro dispatch --ep 8 --tokens 128,us,120,my log\n"
    )
    found = run_json(capsys, "validate", str(path))
    (row,) = found["cloudmatrix384"]["rows"]
    assert row["measured"] == 120 and row["predicted"] > 0


def test_fit_reports_each_residual(capsys):
    found = run_json(capsys, "fit", "cloudmatrix384")
    assert 1 <= len(found["values"]) <= 12
    assert all(abs(r["error"]) < 0.5 for r in found["residuals"])


BAD = {
    "unknown model": (["predict", "decode", "--model", "deepseek-r2"], "deepseek-r1"),
    "unknown machine": ([*DECODE, "--on", "cloudmatrix"], "cloudmatrix384"),
    "unknown module": (["price", "cmjax.deploi:decode_step"], "cmjax.deploy"),
    "unknown function": (["price", "cmjax.deploy:decode_stp"], "decode_step"),
    "size that is no number": (
        ["price", "cmjax.deploy:decode_step", "--size", "batch=x"],
        "batch=x",
    ),
    "missing size": (
        ["price", "cmjax.deploy:decode_step", "--size", "batch=96"],
        "context",
    ),
    "batch does not divide": (["predict", "decode", "--batch", "97"], "batch"),
    "EP above the ranks": ([*DECODE, "--npus", "16", "--ep", "64"], "ep 64 is larger"),
    "EP does not divide": ([*DECODE, "--ep", "48"], "ep 48 does not divide"),
    "a load below the mean": ([*DECODE, "--load", "0.9"], "load must be at least 1, got 0.9"),
    "acceptance above one": ([*DECODE, "--mtp-acceptance", "1.5"], "mtp-acceptance"),
    "negative prompt": ([*DECODE, "--prompt", "-1"], "prompt"),
    "output folder missing": ([*DECODE, "--json", "/no/such/folder/x.json"], "/no/such/folder"),
    "unknown operator": (["micro", "dispach", "--ep", "8"], "dispatch"),
    "missing measurements": (["validate", "nothing.csv"], "nothing.csv"),
    "SLO out of reach": ([*DECODE, "--slo-tpot-ms", "1"], "cannot be met"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, capsys):
    arguments, expected = BAD[case]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (np.array([[1.0, np.nan]]), "NaN"),
        (np.array([[1.0, -2.0]]), "negative"),
        (np.ones((2, 2, 2, 2)), "layers"),
        (np.array([[1.0, 2.0], [0.0, 0.0]]), "zero"),
    ],
    ids=["nan", "negative", "shape", "all-zero layer"],
)
def test_bad_loads_are_refused_before_anything_is_written(counts, expected, capsys, tmp_path):
    path, plan = tmp_path / "bad.npy", tmp_path / "plan.json"
    np.save(path, counts)
    assert main(["place", str(path), "--ranks", "2", "--json", str(plan)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected.lower() in error.lower()
    assert not plan.exists()


def test_load_of_another_model_is_refused(capsys, loads):
    assert main([*DECODE, "--load", str(loads)]) == 2
    assert "58 MoE layers x 256 experts" in capsys.readouterr().err
