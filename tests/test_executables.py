"""Compiled programs are kept between runs, where they may be."""

import json
import os
import subprocess
import sys

import pytest

OPTIONS = ["--random", "tiny", "--prompt-tokens", "1,2,3", "--new-tokens", "3", "--json", "-"]


def _generate(**environment: str) -> list:
    """What `cmjax generate` finds, in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    done = subprocess.run(
        [sys.executable, "-m", "cmjax", "generate", *OPTIONS],
        env=kept | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)["requests"]


@pytest.mark.slow
def test_a_second_run_compiles_nothing_and_generates_the_same(tmp_path):
    first = _generate(CMJAX_CACHE=str(tmp_path))
    (folder,) = tmp_path.glob("compiled-*")
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*-cache")}
    assert len(files) >= 2  # prefill and decode
    assert _generate(CMJAX_CACHE=str(tmp_path)) == first
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*-cache")} == files


@pytest.mark.slow
@pytest.mark.parametrize("others_may_write", [True, False])
def test_nothing_is_kept_where_it_is_off_or_others_may_write(tmp_path, others_may_write):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    _generate(CMJAX_CACHE=str(folder) if others_may_write else "off", HOME=str(tmp_path))
    assert not list(tmp_path.rglob("*-cache"))


@pytest.mark.slow
def test_a_folder_that_jax_was_given_stays_in_use(tmp_path):
    own = tmp_path / "own"
    _generate(
        CMJAX_CACHE=str(tmp_path / "ours"),
        JAX_COMPILATION_CACHE_DIR=str(own),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3",
    )
    assert list(own.glob("*-cache")) and not list((tmp_path / "ours").rglob("*-cache"))


@pytest.mark.slow
def test_a_kept_program_that_is_cut_short_is_compiled_anew(tmp_path):
    first = _generate(CMJAX_CACHE=str(tmp_path))
    kept = list(tmp_path.rglob("*-cache"))
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    assert _generate(CMJAX_CACHE=str(tmp_path)) == first
