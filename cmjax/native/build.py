"""Build the kernels in `csrc/` into one shared library, when cmjax is installed.

A plain shared library, loaded with ctypes, rather than a Python extension module: it needs neither
Python's headers nor a binding generator. It is optional: without a C++ compiler the installation
goes through, and every primitive is lowered by XLA (`python -m cmjax.native` says which).

`python -m cmjax.native.build` builds it in place, in a checkout.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).parent
LIBRARY = "libcmjax_native.so"

# One instruction set per file, named by the file: a flag for all of them would let the compiler
# use it where the CPU has not been asked. GCC contracts a*b+c into a fused operation by default,
# which rounds once instead of twice: then the kernels would not give XLA's numbers.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]
WIDE = [*AVX2, *AVX512, "-mprefer-vector-width=512"]
BF16 = "-mavx512bf16"  # of GCC 10 and Clang 9; an older compiler leaves its file out
ISA_FLAGS = {"_avx2": AVX2, "_avx512": WIDE, "_avx512_bf16": [*WIDE, BF16]}


def sources() -> list[str]:
    """Paths of the C++ files for this machine's architecture, relative to the working folder."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    files = [f for f in (HERE / "csrc").glob("*.cc") if x86 or not _isa_flags(f)]
    return sorted(os.path.relpath(f) for f in files)


class BuildNative(build_ext):
    """setuptools' `build_ext` for one library whose files have flags of their own."""

    def finalize_options(self) -> None:
        (library,) = self.distribution.ext_modules  # pyproject.toml declares it; its files are here
        library.sources = sources()
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        sanitize = os.environ.get("CMJAX_SANITIZE")  # address,undefined
        extra = [f"-fsanitize={sanitize}", "-g", "-fno-sanitize-recover=all"] if sanitize else []
        paths, defined = ext.sources, ["-DCMJAX_AVX512_BF16"]
        if not any(BF16 in _isa_flags(Path(path)) for path in paths) or not self._knows(BF16):
            paths, defined = [p for p in paths if BF16 not in _isa_flags(Path(p))], []

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_preargs=["-isystem", _ffi_headers()],  # their warnings are not ours
                extra_postargs=[*FLAGS, *defined, *_isa_flags(Path(source)), *extra],
                depends=[str(h) for h in (HERE / "csrc").glob("*.[hi]*")],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for made in pool.map(compile_one, paths) for o in made]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread", *extra],
            target_lang="c++",
        )

    def _knows(self, flag: str) -> bool:
        """Whether the compiler takes an option."""
        least = os.path.relpath(HERE / "csrc" / "isa.cc")
        probe = str(Path(self.build_temp, "probe"))
        try:
            self.compiler.compile([least], output_dir=probe, extra_postargs=[FLAGS[0], flag])
        except CompileError:
            return False
        return True


def _isa_flags(source: Path) -> list[str]:
    return next((f for suffix, f in ISA_FLAGS.items() if source.stem.endswith(suffix)), [])


def _ffi_headers() -> str:
    """XLA's FFI headers. In an installation those of the oldest supported jaxlib, which is a build
    requirement: newer jaxlibs accept older libraries, but not the other way round."""
    import jaxlib  # not a requirement of this file when no compiler is there

    return str(Path(jaxlib.__file__).parent / "include")


def main() -> None:
    os.chdir(HERE.parents[1])
    library = Extension("cmjax.native._library", [], language="c++")  # here a failure is an error
    distribution = Distribution({"name": "cmjax", "packages": [], "ext_modules": [library]})
    command = BuildNative(distribution)
    command.inplace = True
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    sys.exit(main())
