"""Whether the kernels are used: what the environment asks for and what the library allows."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.native import library

needs_kernels = pytest.mark.skipif(not library.status().enabled, reason=library.status().reason)


@pytest.fixture
def status_now(monkeypatch):
    """`library.status` as a fresh process would find it."""
    for variable in ("CMJAX_NATIVE", "CMJAX_NATIVE_ISA"):
        monkeypatch.delenv(variable, raising=False)
    return library.status.__wrapped__


def test_off_keeps_to_xla(monkeypatch, status_now):
    monkeypatch.setenv("CMJAX_NATIVE", "off")
    status = status_now()
    assert (status.enabled, status.isa) == (False, "xla")
    assert status.reason == "XLA runs instead of kernels: CMJAX_NATIVE=off"


@pytest.mark.parametrize(
    "variable, value, allowed",
    [
        ("CMJAX_NATIVE", "yes", "auto, on, off"),
        ("CMJAX_NATIVE_ISA", "sse9", "scalar, avx2, avx512_vnni"),
    ],
)
def test_an_unknown_value_is_refused_with_those_that_exist(
    monkeypatch, status_now, variable, value, allowed
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} is '{value}'; use one of {allowed}"):
        status_now()


def _absent(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_PATH", tmp_path / "libcmjax_native.so")
    return "the kernels were not built"


def _unloadable(monkeypatch, tmp_path):
    _absent(monkeypatch, tmp_path)
    library._PATH.write_text("no library")
    return "the library does not load"


def _newer_api(monkeypatch, tmp_path):
    major, minor = library._running_api()
    monkeypatch.setattr(library, "_built_api", lambda _: (major, minor + 1))
    return rf"built for XLA FFI {major}\.{minor + 1} and this jaxlib has {major}\.{minor}"


def _other_api(monkeypatch, tmp_path):
    major, _ = library._running_api()
    monkeypatch.setattr(library, "_built_api", lambda _: (major + 1, 0))
    return f"built for XLA FFI {major + 1}.0"


def _older_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "TARGETS", (*library.TARGETS, "cmjax_new_kernel"))
    return "built from older sources and lacks cmjax_new_kernel"


UNFIT = [
    _absent,
    _unloadable,
    pytest.param(_newer_api, marks=needs_kernels),
    pytest.param(_other_api, marks=needs_kernels),
    pytest.param(_older_sources, marks=needs_kernels),
]


@pytest.mark.parametrize("make_unfit", UNFIT)
def test_a_library_that_does_not_fit_is_left_alone_and_an_error_if_it_was_asked_for(
    monkeypatch, tmp_path, status_now, make_unfit
):
    why = make_unfit(monkeypatch, tmp_path)
    assert not status_now().enabled
    monkeypatch.setenv("CMJAX_NATIVE", "on")
    with pytest.raises(RuntimeError, match=f"CMJAX_NATIVE=on, but .*{why}"):
        status_now()


@needs_kernels
def test_an_older_minor_version_is_accepted(monkeypatch, status_now):
    major, minor = library._running_api()
    monkeypatch.setattr(library, "_built_api", lambda _: (major, max(minor - 1, 0)))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **kwargs: None)
    assert status_now().enabled


@needs_kernels
def test_the_library_has_every_target_and_names_its_instruction_set():
    loaded = ctypes.CDLL(str(library._PATH))
    assert all(hasattr(loaded, target) for target in library.TARGETS)
    assert library.status().isa in ("scalar", "avx2", "avx512_vnni")


@needs_kernels
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 2**18, 2**18 + 1, 3 * 2**18 - 7])
def test_sum_words_adds_every_word_once_and_wraps(size):
    words = np.random.default_rng(size).integers(-(2**31), 2**31, size).astype(np.int32)
    out = jax.ShapeDtypeStruct((1,), jnp.int32)
    total = jax.jit(lambda words: library.call("cmjax_sum_words", out, words))(words)
    expected = np.array([words.astype(np.int64).sum()]).astype(np.int32)
    np.testing.assert_array_equal(total, expected)
