"""Traced programs are kept between runs, and a file there can do no harm."""

import os
import pickle

import jax
import pytest

import cmjax
from cmjax.deploy import predictor, program_cache
from cmjax.deploy.program_cache import kept
from cmjax.program import Size


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CMJAX_CACHE", str(tmp_path / "programs"))
    return tmp_path / "programs"


def counted(made):
    return lambda: made.append(1) or Size.of(3.0)


def test_a_value_is_made_once_for_a_key(folder):
    made = []
    for key in (("a",), ("a",), ("b",), ("a",)):
        assert kept(key, counted(made)).evaluate({}) == 3.0
    assert len(made) == 2
    assert folder.stat().st_mode & 0o777 == 0o700


def test_another_version_of_the_code_makes_it_anew(folder, monkeypatch):
    made = []
    kept(("a",), counted(made))
    monkeypatch.setattr(program_cache, "_code", lambda: "another")
    kept(("a",), counted(made))
    assert len(made) == 2


def test_nothing_is_kept_where_it_is_off(folder, monkeypatch):
    monkeypatch.setenv("CMJAX_CACHE", "off")
    made = []
    for _ in range(2):
        kept(("a",), counted(made))
    assert len(made) == 2 and not folder.exists()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps(Size.of(1.0))[:20], pickle.dumps(Harmful())]
)
def test_a_file_that_is_none_of_ours_is_made_anew_and_runs_nothing(
    folder, content, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made = []
    kept(("a",), counted(made))
    (path,) = folder.iterdir()
    path.write_bytes(content)
    assert kept(("a",), counted(made)).evaluate({}) == 3.0
    assert len(made) == 2 and not (tmp_path / "harm").exists()
    assert kept(("a",), counted(made)).evaluate({}) == 3.0 and len(made) == 2  # it was replaced


def test_a_folder_that_others_may_write_to_is_not_read(folder):
    made = []
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    for _ in range(2):
        kept(("a",), counted(made))
    assert len(made) == 2 and not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_no_fault(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CMJAX_CACHE", str(tmp_path / "file" / "programs"))
    assert kept(("a",), counted([])).evaluate({}) == 3.0


def test_the_least_recently_used_go_first(folder, monkeypatch):
    monkeypatch.setattr(program_cache, "_KEPT", 2)
    made = []
    for name in "abc":
        kept((name,), counted(made))
        for age, path in enumerate(sorted(folder.iterdir(), key=lambda p: -p.stat().st_mtime)):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert len(list(folder.iterdir())) == 2
    kept(("c",), counted(made))
    assert len(made) == 3


def test_a_prediction_is_made_again_without_tracing(folder, monkeypatch):
    def predict():
        predictor._traced.cache_clear()
        machine = cmjax.load_machine("cloudmatrix384")
        return cmjax.predict(
            "deepseek-r1", machine, phase="decode", batch=96, context=4096
        ).to_dict()

    first = predict()

    def refuse(*_, **__):
        raise AssertionError("traced again")

    monkeypatch.setattr(jax, "make_jaxpr", refuse)
    monkeypatch.setattr(predictor, "build_step", refuse)
    assert predict() == first
