"""What `pip install` puts on a machine works from any folder, and is all of cmjax and no more."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, cwd, **environment) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA", "JAX"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip("this is no git checkout")
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    quiet = ("--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *quiet, "--no-deps", "-w", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> tuple[Path, Path]:
    """The programs of a fresh environment with nothing but the wheel, and an empty folder."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    binaries = home / "bin"
    run(binaries / "python", "-m", "pip", "install", "--quiet", wheel, cwd=home)
    return binaries, tmp_path_factory.mktemp("empty")


def test_the_wheel_holds_cmjax_and_no_other_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cmjax"}
    for folder, package in (("cmjax", "cmjax"), ("models", "cmjax/models")):
        tracked = subprocess.run(
            ["git", "ls-files", f"{folder}/*.py", f"{folder}/*.pyi", f"{folder}/*.toml"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        missing = {package + name.removeprefix(folder) for name in tracked} - set(names)
        assert tracked and not missing, missing


def test_the_commands_work_in_an_empty_folder(installed):
    binaries, empty = installed
    cmjax = binaries / "cmjax"
    result = json.loads(run(cmjax, "predict", "decode", "--json", "-", cwd=empty))
    assert result["tpot_ms"] > 0
    counts = np.random.default_rng(0).integers(1, 1000, size=(2, 16))
    np.save(empty / "loads.npy", counts)
    run(
        cmjax,
        "place",
        "loads.npy",
        "--ranks",
        "4",
        "--seconds",
        "1",
        "--json",
        "plan.json",
        cwd=empty,
    )
    assert json.loads((empty / "plan.json").read_text())["method"] == "search"
    assert "mean error" in run(cmjax, "validate", cwd=empty)
    one = ("--random", "tiny", "--prompt", "The", "--new-tokens", "2")
    assert "The" in run(cmjax, "generate", *one, cwd=empty)
    (empty / "book.txt").write_text("A key lies under the mat. " * 40)
    asked = ("--random", "tiny", "--text", "book.txt", "--question", "Where?")
    sizes = ("--window", "96", "--segment", "24", "--new-tokens", "2")
    run(cmjax, "xl3m", *asked, *sizes, cwd=empty)


def test_a_notebook_works_in_an_empty_folder(installed):
    binaries, empty = installed
    lines = (
        "import cmjax; p = cmjax.predict('tiny', phase='decode', npus=4); print(p);"
        "from cmjax.models import moe; print(moe.__name__); import sys;"
        "assert not {'models', 'train', 'studies'} & set(sys.modules)"
    )
    assert "TPOT" in run(binaries / "python", "-c", lines, cwd=empty)
