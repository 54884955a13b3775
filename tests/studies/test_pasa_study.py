"""The PASA study: its distributions, its reading of a user's files, and what it refuses."""

import numpy as np
import pytest

from cmjax.options import run_program
from studies.pasa import DRAWN, MARKERS, RECIPE, ZERO_MEAN_V, Case, Study, main


def test_the_cases_are_the_authors_grid_and_the_drawn_ones_are_among_them():
    assert len(RECIPE) == 16 + 4 and len(ZERO_MEAN_V) == 24 and len(DRAWN) == 10
    assert all(case.common_v for case in RECIPE)
    drawn = Case("uniform", 20, 5, False).draw(300, 1)
    assert 14.9 < drawn.q.min() < drawn.q.max() < 25.1
    assert abs(drawn.v.mean()) < 0.1 < 10 < drawn.k.mean()


def test_the_resonance_centre_is_half_of_d_times_the_amplitudes():
    drawn = Case("resonance", 180, 60, False).draw(300, 1)
    scores = drawn.q[:, 0].astype(float) @ drawn.k[:, 0].astype(float).T
    assert scores.mean() == pytest.approx(-230_400, rel=0.01)


@pytest.mark.slow
def test_the_benchmark_prints_every_case_and_writes_page_and_pictures(tmp_path, capsys):
    main(Study(out=tmp_path, length=96, heads=1))
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in ZERO_MEAN_V)
    assert "Derived, not the paper's" in printed and "NaN 100 %" in printed
    page = (tmp_path / "pasa.html").read_text()
    assert page.count("data:image/png") == 2 and len(MARKERS) == 6


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_own_operands_are_read_and_judged(kind, tmp_path, capsys):
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(40, 1, (50, 2, 64)).astype(np.float32) for name in "qkv"}
    if kind == "npy":
        arguments = []
        for name, tensor in tensors.items():
            np.save(tmp_path / f"{name}.npy", tensor)
            arguments += [f"--{name}", str(tmp_path / f"{name}.npy")]
    else:
        path = tmp_path / f"all.{kind}"
        if kind == "npz":
            np.savez(path, **tensors)
        else:
            pytest.importorskip("safetensors.numpy").save_file(tensors, path)
        arguments = ["--qkv", str(path)]
    assert run_program(main, Study, None, arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "100 % of the scores overflow float16, in 100 % of the rows" in printed
    assert "PASA keeps them in range" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--q", "q.npy"], "--k, --v missing"),
        (["--qkv", "none.npz"], "none.npz: no such file"),
        (["--qkv", "x.npz", "--q", "q.npy"], "give either --qkv or --q, --k and --v"),
        (["--qkv", "TEXT"], "expected .npy for one operand"),
        (["--qkv", "PART"], "no tensor k, v; it has q"),
        (["--qkv", "RANKS"], "q must be"),
    ],
)
def test_bad_files_are_refused_with_exit_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("no tensors")
    np.savez(tmp_path / "part.npz", q=np.ones((4, 1, 8)))
    np.savez(tmp_path / "ranks.npz", q=np.ones((4, 8)), k=np.ones((4, 8)), v=np.ones((4, 8)))
    files = {"TEXT": "text.txt", "PART": "part.npz", "RANKS": "ranks.npz"}
    arguments = [str(tmp_path / files[a]) if a in files else a for a in arguments]
    assert run_program(main, Study, None, arguments) == 2
    assert message in capsys.readouterr().err
