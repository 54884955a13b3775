"""Recordings: read from any format libsndfile knows, checked, and resampled by soxr."""

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from cmjax.models.asr.containers import BadAudio, whole

RATES = (4_000, 192_000)
SUFFIXES = tuple(".wav .flac .sph .ogg .mp3 .aiff .aif .aifc .opus .au .caf .rf64".split())
_BLOCK = 1 << 18
_MOST_SAMPLES = 1 << 28  # a GiB of float32: an hour and a half at 48 kHz
_UNKNOWN = 1 << 62  # frames of a file that does not say how many
_OPPOSED = 0.1  # share of a channel's energy below which channels cancel rather than add
_MOST_CLIPPED = 0.01
_OVERDRIVEN = 16.0


def read_file(path: Path, rate: int) -> Int16[np.ndarray, "time"]:
    """`read_audio` of a file.

    Raises: BadAudio: as there, or the file cannot be read; without its name.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadAudio(f"cannot be read: {error.strerror}") from None
    return read_audio(data, rate)


def read_audio(
    data: bytes, rate: int, *, samples: int | None = None, seconds: float | None = None
) -> Int16[np.ndarray, "time"]:
    """One channel of a recording, resampled.

    Channels are averaged; where they cancel each other, as one with the wires of its microphone
    swapped does, the loudest is taken. A header without a length, as of a file that came through a
    pipe, is no fault.

    Args:
      data: a whole file.
      rate: samples per second wanted.
      samples: how many samples the file should hold, if a list says so.
      seconds: how long it should last, if a list says so.
    Raises:
      BadAudio: not audio, empty, truncated, silent, not finite, floating point in units of
        integers, an impossible sample rate, or a length that contradicts `samples` or `seconds`
        (such as a wrong rate in the header).
    Example: a tenth of a second at 8 kHz, read at 16 kHz.

      >>> import io, numpy as np, soundfile
      >>> file = io.BytesIO()
      >>> soundfile.write(file, 0.5 * np.sin(np.arange(800)), 8000, format="WAV")
      >>> read_audio(file.getvalue(), 16000).shape
      (1600,)
    """
    if not data:
        raise BadAudio("the file is empty")
    channels, own_rate = _decoded(whole(data))
    wave = _one_channel(channels)
    if samples is not None and len(wave) != samples:
        raise BadAudio(f"holds {len(wave)} samples, its list says {samples}")
    if seconds is not None and abs(len(wave) / own_rate - seconds) > 0.02 + 0.02 * seconds:
        raise BadAudio(
            f"lasts {len(wave) / own_rate:.2f} s at the {own_rate} Hz of its header, its list says "
            f"{seconds:.2f} s: truncated, or a wrong sample rate in the header"
        )
    if own_rate != rate:
        wave = soxr.resample(wave, own_rate, rate)
    return np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)


def _decoded(data: bytes) -> tuple[Float32[np.ndarray, "time channels"], int]:
    """(what libsndfile makes of a file, samples per second)."""
    blocks, count = [], 0
    try:
        with _opened(data) as file:
            stated, rate = file.frames, file.samplerate
            floats = file.subtype in ("FLOAT", "DOUBLE")
            if not RATES[0] <= rate <= RATES[1]:
                wanted = f"{RATES[0]} to {RATES[1]} are possible"
                raise BadAudio(f"the header gives {rate} samples per second, {wanted}")
            # In blocks: some codecs cannot say how much is left, and a header may claim anything.
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block)
                count += len(block)
                if count * block.shape[1] > _MOST_SAMPLES:
                    raise BadAudio(f"holds over {_MOST_SAMPLES} samples: cut it into pieces")
    except BadAudio:
        raise
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        said = getattr(error, "error_string", str(error)).removeprefix("Error : ")
        raise BadAudio(f"not readable as audio: {said}") from None
    if count < stated < _UNKNOWN:
        raise BadAudio(f"truncated: {count} of {stated} samples")
    if not count:
        raise BadAudio("holds no samples")
    channels = np.concatenate(blocks)
    if not np.isfinite(channels).all():
        raise BadAudio("holds samples that are not finite")
    if floats:
        _check_units(channels)
    return channels, rate


@contextmanager
def _opened(data: bytes) -> Iterator[soundfile.SoundFile]:
    """A file in memory; MP3 on disk, where libsndfile knows it by its suffix alone."""
    if data[:3] != b"ID3" and not (data[0] == 0xFF and data[1:2] >= b"\xe0"):
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.mp3"
        path.write_bytes(data)
        with soundfile.SoundFile(path) as file:
            yield file


def _one_channel(channels: Float32[np.ndarray, "time channels"]) -> Float32[np.ndarray, "time"]:
    wave = channels.mean(axis=1)
    if channels.shape[1] > 1:
        energies = np.square(channels, dtype=np.float64).sum(axis=0)
        if np.square(wave, dtype=np.float64).sum() < _OPPOSED * energies.max():
            wave = channels[:, energies.argmax()]
    if not wave.any():
        raise BadAudio("is silent: every sample is zero")
    return wave


def _check_units(channels: Float32[np.ndarray, "time channels"]) -> None:
    """Refuse floating point in other units than full scale, which clipping would make noise of."""
    sizes = np.abs(channels)
    most, clipped = float(sizes.max()), float((sizes > 1).mean())
    if most > _OVERDRIVEN:
        bits = next((bits for bits in (16, 24, 32) if most <= 1 << (bits - 1)), None)
        unit = f"divide by {1 << (bits - 1)}" if bits else "write it anew"
        raise BadAudio(
            f"holds floating-point samples up to {most:.6g}, where 1 is full scale: "
            f"{f'{bits}-bit integers as floats; ' if bits else ''}{unit}"
        )
    if clipped > _MOST_CLIPPED:
        raise BadAudio(
            f"{clipped:.0%} of its floating-point samples are beyond full scale (up to "
            f"{most:.3g}): write it anew, softer"
        )
