"""Recordings of a data set: where they are, loose or in archives, and one with its transcript."""

import dataclasses
import gzip
import hashlib
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float32, Int16

from cmjax.models.asr.audio import SUFFIXES

Reader = Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One recording and what is said in it.

    Attributes:
      name: unique in its corpus.
      speaker: who speaks.
      text: the transcript.
      samples: 16-bit samples at the corpus's rate.
    """

    name: str
    speaker: str
    text: str
    samples: Int16[np.ndarray, "time"]

    def waveform(self) -> Float32[np.ndarray, "time"]:
        """Samples as fractions of full scale."""
        return self.samples.astype(np.float32) / 32768

    def digest(self) -> str:
        """Of the samples: equal for the same recording under any name."""
        return hashlib.blake2b(self.samples.tobytes(), digest_size=8).hexdigest()


class Recordings:
    """Recordings of a folder and of the `.tar.gz` in it, by their path inside."""

    def __init__(self, folder: Path, readers: dict[str, Reader]):
        self._folder, self._readers = folder, readers
        self._by_end: dict[str, list[str]] = {}
        for path in readers:
            for name in {PurePosixPath(path).name, PurePosixPath(path).stem}:
                self._by_end.setdefault(name, []).append(path)

    def items(self) -> Iterable[tuple[str, Reader]]:
        """(path, a function that reads it) of every recording."""
        return self._readers.items()

    def names(self) -> dict[str, str]:
        """Path -> file name; the path itself where two files of different folders share theirs."""
        shared = Counter(PurePosixPath(path).name for path in self._readers)
        last = {path: PurePosixPath(path).name for path in self._readers}
        return {path: name if shared[name] == 1 else path for path, name in last.items()}

    def find(self, given: str, where: str) -> Reader | None:
        """The recording that a list means: by its path in the folder, by the end of that path, with
        or without suffix, or anywhere on this machine; None where there is none.

        Raises: ValueError: several recordings end in `given`.
        """
        name = str(PurePosixPath(given.replace("\\", "/")))
        if name in self._readers:
            return self._readers[name]
        ends = self._by_end.get(PurePosixPath(name).name, [])
        fits = [path for path in ends if f"/{path}".endswith(f"/{name}")]
        fits = fits or [
            p for p in ends if f"/{PurePosixPath(p).with_suffix('')}".endswith(f"/{name}")
        ]
        if len(fits) > 1:
            raise ValueError(
                f"{where}: {given!r} may be {' or '.join(sorted(fits)[:3])}; give its folder too"
            )
        if fits:
            return self._readers[fits[0]]
        path = self._folder / given
        try:
            return path.read_bytes if path.is_file() else None
        except OSError:  # a name that no file can have
            return None


def find_audio(folder: Path) -> Recordings:
    """Recordings of a folder and of the `.tar.gz` in it.

    Where archives (or one of them and the folder) have different recordings of one path, the
    archive's name comes in front of it.

    Raises:
      ValueError: no such folder, an archive that is broken, or no recordings; says what was looked
        for.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    found: dict[str, list[tuple[str, Reader]]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if path.suffix.lower() in SUFFIXES and path.is_file():
            found.setdefault(inside, []).append(("", path.read_bytes))
        elif path.name.endswith((".tar.gz", ".tgz", ".tar")):
            for name, read in _members(path).items():
                found.setdefault(name, []).append((inside, read))
    readers = {}
    for path in sorted(found):
        own = found[path]
        if len({hashlib.sha256(read()).digest() for _, read in own} if len(own) > 1 else own) == 1:
            readers[path] = own[0][1]
        else:
            readers |= {f"{origin}/{path}" if origin else path: read for origin, read in own}
    if not readers:
        raise ValueError(f"no recordings ({', '.join(SUFFIXES)}) in {folder} or its .tar.gz")
    return Recordings(folder, readers)


def _members(path: Path) -> dict[str, Reader]:
    def reader(data: bytes) -> Reader:
        return lambda: data

    out = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    file = archive.extractfile(member)
                    assert file is not None  # a plain file
                    out[str(PurePosixPath(member.name))] = reader(file.read())
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        said = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{path} is no archive, or a broken one: {said}") from None
    return out
