"""Load the kernels' shared library, if it is there and fits, and hand its functions to JAX."""

import ctypes
import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

_PATH = Path(__file__).with_name("libcmjax_native.so")
_SWITCH = "CMJAX_NATIVE"

# Every function of the library that computes; the names are those of csrc/*.cc.
TARGETS = (
    "cmjax_attention",
    "cmjax_conv1d",
    "cmjax_fsmn_memory",
    "cmjax_grouped_dot",
    "cmjax_grouped_msd_int8",
    "cmjax_grouped_msd_mxfp4",
    "cmjax_latent_attention",
    "cmjax_mel_energies",
    "cmjax_msd_int8",
    "cmjax_msd_mxfp4",
    "cmjax_rms_norm",
    "cmjax_rotary_heads",
    "cmjax_route",
    "cmjax_sorted_experts_int8",
    "cmjax_sorted_experts_mxfp4",
    "cmjax_sorted_experts_w8a8",
    "cmjax_sum_words",
)

# Functions that are called as they are, on arrays of the host: see `function`.
PLAIN = ("cmjax_serve_hits", "cmjax_serve_run", "cmjax_serve_take")


@dataclass(frozen=True, kw_only=True)
class Status:
    """Whether the kernels run, and on what.

    enabled: kernels are used for CPU devices.
    isa: instruction set in use: "scalar", "avx2" or "avx512_vnni"; "xla" if not enabled.
    reason: one sentence that says why.
    bfloat16: bfloat16 is multiplied as it is (AVX512_BF16), not widened first.
    """

    enabled: bool
    isa: str
    reason: str
    bfloat16: bool = False


@functools.cache
def status() -> Status:
    """Load and register the kernels on first call; say how that went.

    The environment variable `CMJAX_NATIVE=off` keeps XLA's lowering everywhere, `CMJAX_NATIVE=on`
    makes a missing or unfit library an error, and `CMJAX_NATIVE_ISA=avx2` (or `scalar`) keeps to a
    smaller instruction set (`avx512_vnni` does without AVX512_BF16). All give the same integers.

    Raises: RuntimeError with `CMJAX_NATIVE=on` if the kernels cannot be used; ValueError if either
      variable has another value.
    """
    switch = _choice(_SWITCH, "auto", ("auto", "on", "off"))
    _choice("CMJAX_NATIVE_ISA", "", ("", "scalar", "avx2", "avx512_vnni"))
    if switch == "off":
        return _without(f"{_SWITCH}=off")
    if not _PATH.exists():
        return _without(
            "the kernels were not built: no C++ compiler was found when cmjax was installed",
            needed=switch == "on",
        )
    try:
        library = ctypes.CDLL(str(_PATH))
    except OSError as error:
        return _without(f"the library does not load: {error}", needed=switch == "on")
    built, running = _built_api(library), _running_api()
    if built[0] != running[0] or built[1] > running[1]:
        return _without(
            "the library was built for XLA FFI {}.{} and this jaxlib has {}.{}; "
            "install cmjax again".format(*built, *running),
            needed=switch == "on",
        )
    missing = [name for name in (*TARGETS, *PLAIN) if not hasattr(library, name)]
    if missing:
        return _without(
            f"the library was built from older sources and lacks {', '.join(missing)}; "
            "install cmjax again",
            needed=switch == "on",
        )
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    library.cmjax_isa.restype = ctypes.c_char_p
    isa = library.cmjax_isa().decode()
    library.cmjax_multiplies_bfloat16.restype = ctypes.c_bool
    bfloat16 = library.cmjax_multiplies_bfloat16()
    what = f"{isa} and avx512_bf16" if bfloat16 else isa
    reason = f"the kernels run, with {what} instructions"
    return Status(enabled=True, isa=isa, reason=reason, bfloat16=bfloat16)


def call(target: str, out: Any, *operands: jax.Array, **attributes: Any) -> Any:
    """`jax.ffi.ffi_call` of one of `TARGETS`; for use in a primitive's `native` lowering only.

    Args:
      target: name of the C++ function.
      out: a `jax.ShapeDtypeStruct`, or a sequence of them.
      operands, attributes: as the C++ function declares them; attributes are NumPy scalars.
    """
    assert target in TARGETS and status().enabled, (target, status())  # the first call registers
    outs = list(out) if isinstance(out, Sequence) else out
    return jax.ffi.ffi_call(target, outs)(*operands, **attributes)


def function(name: str) -> Any:
    """One of `PLAIN`, whose types the caller sets; `None` where the kernels do not run."""
    assert name in PLAIN, name
    return getattr(_opened(), name) if status().enabled else None


@functools.cache
def _opened() -> ctypes.CDLL:
    return ctypes.CDLL(str(_PATH))


def _choice(variable: str, default: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(variable, default)
    if value not in values:
        allowed = ", ".join(v for v in values if v)
        raise ValueError(f"the environment variable {variable} is {value!r}; use one of {allowed}")
    return value


def _without(reason: str, *, needed: bool = False) -> Status:
    if needed:
        raise RuntimeError(f"{_SWITCH}=on, but {reason}")
    return Status(enabled=False, isa="xla", reason=f"XLA runs instead of kernels: {reason}")


def _built_api(library: ctypes.CDLL) -> tuple[int, int]:
    return library.cmjax_ffi_api_major(), library.cmjax_ffi_api_minor()


def _running_api() -> tuple[int, int]:
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    numbers = (re.search(rf"XLA_FFI_API_{part}\s+(\d+)", header) for part in ("MAJOR", "MINOR"))
    major, minor = (int(found.group(1)) if found else -1 for found in numbers)
    return major, minor
