"""Recordings: read from any format libsndfile knows, checked, and resampled by soxr."""

import dataclasses
import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

RATES = (4_000, 192_000)
SUFFIXES = (".wav", ".flac", ".sph", ".ogg", ".mp3", ".aiff")


class BadAudio(ValueError):
    """A recording that cannot be used; the message says why."""


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


def read_audio(
    data: bytes, rate: int, *, samples: int | None = None, seconds: float | None = None
) -> Int16[np.ndarray, "time"]:
    """One channel of a recording, resampled.

    Args:
      data: a whole file.
      rate: samples per second wanted.
      samples: how many samples the file should hold, if a list says so.
      seconds: how long it should last, if a list says so.
    Raises:
      BadAudio: not audio, empty, truncated, silent, not finite, an impossible sample rate, or a
        length that contradicts `samples` or `seconds` (such as a wrong rate in the header).
    """
    if not data:
        raise BadAudio("the file is empty")
    _check_riff(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            stated, own_rate = file.frames, file.samplerate
            wave = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise BadAudio(f"not readable as audio: {error}") from None
    if not RATES[0] <= own_rate <= RATES[1]:
        raise BadAudio(f"the header gives {own_rate} samples per second, {RATES[0]} is the least")
    if len(wave) < stated:
        raise BadAudio(f"truncated: {len(wave)} of {stated} samples")
    if not len(wave):
        raise BadAudio("holds no samples")
    if samples is not None and len(wave) != samples:
        raise BadAudio(f"holds {len(wave)} samples, its list says {samples}")
    if seconds is not None and abs(len(wave) / own_rate - seconds) > 0.02 + 0.02 * seconds:
        raise BadAudio(
            f"lasts {len(wave) / own_rate:.2f} s at the {own_rate} Hz of its header, its list says "
            f"{seconds:.2f} s: truncated, or a wrong sample rate in the header"
        )
    if not np.isfinite(wave).all():
        raise BadAudio("holds samples that are not finite")
    if not wave.any():
        raise BadAudio("is silent: every sample is zero")
    if own_rate != rate:
        wave = soxr.resample(wave, own_rate, rate)
    return np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)


def find_audio(folder: Path) -> dict[str, Callable[[], bytes]]:
    """Recordings of a folder and of the `.tar.gz` in it: path inside -> a function that reads it.

    Raises:
      ValueError: no such folder, an archive that is broken, or no recordings; says what was looked
        for.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    found: dict[str, Callable[[], bytes]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            found[str(path.relative_to(folder))] = path.read_bytes
        elif path.name.endswith((".tar.gz", ".tgz", ".tar")):
            found.update(_members(path))
    if not found:
        raise ValueError(f"no recordings ({', '.join(SUFFIXES)}) in {folder} or its .tar.gz")
    return found


def by_name(paths: Iterable[str]) -> dict[str, str]:
    """File name without folders and suffix -> path."""
    return {Path(path).stem: path for path in paths}


def _members(path: Path) -> dict[str, Callable[[], bytes]]:
    def reader(data: bytes) -> Callable[[], bytes]:
        return lambda: data

    out = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    file = archive.extractfile(member)
                    assert file is not None  # a plain file
                    out[member.name] = reader(file.read())
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        said = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{path} is no archive, or a broken one: {said}") from None
    return out


def _check_riff(data: bytes) -> None:
    """Compare a WAV file's header with its size; libsndfile reads what is left of a torn file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    at = 12
    while at + 8 <= len(data):
        chunk, size = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])[0]
        left = len(data) - at - 8
        if chunk == b"fmt " and left >= 8:
            rate = struct.unpack("<I", data[at + 12 : at + 16])[0]
            if not RATES[0] <= rate <= RATES[1]:
                raise BadAudio(f"the header gives {rate} samples per second")
        if chunk == b"data":
            if size not in (0, 0xFFFFFFFF) and size > left:  # a stream's header has no size
                raise BadAudio(f"truncated: {left} of {size} bytes of sound")
            return
        at += 8 + size + size % 2
    raise BadAudio("truncated: the header ends before the sound")
