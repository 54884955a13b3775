"""`cmjax parallel`: plans priced, found and refused, as a user meets them."""

import itertools
import json
import subprocess
import sys

import pytest

import cmjax
from cmjax.cli import main

SMALL = ["--layers", "8", "--hidden", "1024", "--heads", "16", "--vocab", "32000"]
PLAN = (
    "data=16,tensor=8,pipeline=16,micro_batch=1,schedule=1f1b,interleave=1,recompute=full,"
    "optimizer=zero1"
)
PARTS = {"parameters", "gradients", "optimizer", "activations", "buffers"}


def answer(capsys, *arguments):
    assert main(["parallel", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_given_plan_is_priced(capsys):
    found = answer(capsys, "--model", "pangu-200b", "--on", "ascend910-2048", "--plan", PLAN)
    assert found["bubble"] == pytest.approx(15 / 47)
    assert set(found["memory_gib"]) == PARTS
    assert found["peak_memory_gib"] == pytest.approx(sum(found["memory_gib"].values()))
    tokens = 512 * 1024 / 2048
    assert found["tokens_per_s_per_device"] == pytest.approx(tokens / found["step_s"])
    assert 0 < found["mfu"] < 1
    degrees = ("data", "tensor", "pipeline", "micro_batch", "schedule", "interleave", "optimizer")
    assert [found[name] for name in degrees] == [16, 8, 16, 1, "1f1b", 1, "zero1"]


def test_any_gpt_is_searched_by_its_sizes(capsys, tmp_path):
    picture = tmp_path / "plans.png"
    run = [*SMALL, "--ffn", "4096", "--sequence", "512", "--on", "a100-pod", "--devices", "8"]
    found = answer(capsys, *run, "--global-batch", "32", "--top", "3", "--plot", str(picture))
    assert len(found["plans"]) == 3 and picture.stat().st_size > 1000
    assert found["step_s"] == found["plans"][0]["step_s"]
    assert found["data"] * found["tensor"] * found["pipeline"] == found["devices"] == 8
    given = answer(capsys, *run, "--global-batch", "32", "--plan", found["plan"])
    assert given["step_s"] == pytest.approx(found["step_s"])


def test_measured_rows_are_priced_and_their_errors_told(capsys, tmp_path):
    head = "hidden,heads,layers,sequence,tensor,data,pipeline,gpus,global_batch,micro_batch"
    rows = ["1024,16,8,512,1,2,1,2,8,1,100", "1024,16,8,512,2,1,1,2,8,1,150",
            "1024,16,8,512,3,1,1,3,9,1,1", "1024,16,8,512,1,1,2,2,8,1,120"]  # fmt: skip
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([head + ",iteration_ms", *rows, ""]))
    found = answer(capsys, "--on", "a100-pod", "--measured", str(path))
    assert [row["line"] for row in found["rows"]] == [2, 3, 5]
    errors = [abs(r["predicted_s"] / r["measured_s"] - 1) for r in found["rows"]]
    assert found["mean_error"] == pytest.approx(sum(errors) / 3)
    assert found["worst_error"] == pytest.approx(max(errors))
    signs = [
        (a["measured_s"] < b["measured_s"]) == (a["predicted_s"] < b["predicted_s"])
        for a, b in itertools.combinations(found["rows"], 2)
    ]
    assert found["kendall_tau"] == pytest.approx((2 * sum(signs) - 3) / 3)
    assert found["skipped"][0].startswith("line 4: plan: tensor=3 must divide the 16 heads")
    assert main(["parallel", "--on", "a100-pod", "--measured", str(path)]) == 0
    assert "not priced: line 4" in capsys.readouterr().out


MODEL = ["--model", "pangu-13b", "--on", "selene"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "pangu-20b"], "unknown model 'pangu-20b'; closest: pangu-200b"),
        (["--model", "pangu-13b", "--on", "selenium"], "unknown machine 'selenium'"),
        ([], "--layers is needed, or --model"),
        (["--layers", "8", "--hidden", "64"], "--heads is needed"),
        (["--model", "pangu-13b", "--hidden", "64"], "--hidden does not go with --model"),
        (["--layers", "8", "--hidden", "100", "--heads", "3"], "must be a multiple of heads"),
        ([*MODEL, "--devices", "0"], "devices must be at least 1, got 0"),
        ([*MODEL, "--devices", "5000"], "5000 devices are asked for; selene has 4480"),
        ([*MODEL, "--devices", "43"], "no plan divides 43 devices"),
        ([*MODEL, "--plan", "pipeline=2,layers=19-20"], "layers=19-20 makes 39; the model has 40"),
        ([*MODEL, "--plan", "pipeline=2,layers=40-0"], "layers must be at least 1 on every stage"),
        ([*MODEL, "--plan", "pipeline=3,layers=20-20"], "layers=20x2 has 2 numbers; one for each"),
        ([*MODEL, "--devices", "1", "--global-batch", "1"], "GiB are missing"),
        ([*MODEL, "--global-batch", "0"], "global_batch and top must be at least 1"),
        ([*MODEL, "--top", "0"], "global_batch and top must be at least 1"),
        ([*MODEL, "--sequence", "0"], "sequence must be a whole number of at least 1"),
        ([*MODEL, "--plan", "data=3"], "data=3 x micro_batch=1 does not divide"),
        ([*MODEL, "--plan", "dta=4"], "unknown name 'dta'; closest: data"),
        ([*MODEL, "--plan", "tensor=8", "--devices", "16"], "make 8 devices, not 16"),
        ([*MODEL, "--plan", "tensor=2"], "GiB are missing"),
        ([*MODEL, "--plan", "tensor=8", "--plot", "x.gif"], ".png or .svg"),
        (["--on", "a100-pod", "--measured", "absent.csv"], "absent.csv: cannot be read"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, says, capsys):
    assert main(["parallel", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


HEAD = "hidden,heads,layers,sequence,tensor,pipeline,global_batch,iteration_ms"


def test_a_file_without_a_row_that_can_be_priced_is_refused(capsys, tmp_path):
    for text, says in (
        ("", "no row can be priced"),
        ("a,b\n1,2\n", "no row can be priced: no column hidden; expected hidden, heads"),
        (HEAD + "\n1024,16,8\n", "line 2: expected 8 cells, found 3"),
        (HEAD + "\nx,16,8,512,1,1,8,100\n", "line 2: column hidden must be a whole number >= 1"),
        (HEAD + "\n1024,16,8,512,1,1,8,-1\n", "column iteration_ms must be a positive number"),
        (HEAD + "\n" + "9" * 5000 + ",16,8,512,1,1,8,1\n", "line 2: column hidden must be"),
    ):
        path = tmp_path / "rows.csv"
        path.write_text(text)
        assert main(["parallel", "--on", "a100-pod", "--measured", str(path)]) == 2
        assert says in capsys.readouterr().err
    path.write_bytes(b"\xff\xfe\x00")
    assert main(["parallel", "--on", "a100-pod", "--measured", str(path)]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "first",
    ["import cmjax.parallelism.search", "from cmjax.commands import Parallel; Parallel()",
     "import cmjax.parallelism.parallel", "from cmjax import parallel", "import cmjax.report"],
)  # fmt: skip
def test_the_face_has_its_function_whatever_was_imported_before(first):
    call = "import cmjax; assert cmjax.parallel.__name__ == 'parallel' and callable(cmjax.parallel)"
    subprocess.run([sys.executable, "-c", f"{first}\n{call}"], check=True)


def test_no_package_hides_a_function_of_the_face():
    """A submodule that is imported becomes an attribute of its package, over a function's name."""
    assert not hasattr(cmjax.parallel, "__path__")
    assert not hasattr(cmjax.serve, "__path__") and not hasattr(cmjax.place, "__path__")
