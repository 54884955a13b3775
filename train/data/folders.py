"""Data sets as they lie on disk: FSDD, yesno, AN4, LibriSpeech, Kaldi folders, JSON-lines lists.

Each loader returns the entries of its layout; `load` reads, checks and splits them.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from cmjax.inputs import parse_json
from cmjax.models.asr.text import Units
from train.data.audio import Reader, Recordings, find_audio
from train.data.corpus import Corpus, Entry, assemble
from train.data.lists import Line, head, lines, number, pairs, table, text_of
from train.data.splits import SPLIT_COLUMNS, Split, named_split, path_split, stated_split

Layout = Literal["fsdd", "yesno", "an4", "librispeech", "kaldi", "manifest"]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load(
    layout: Layout,
    folder: Path,
    *,
    rate: int | None = None,
    unseen: Sequence[str] = (),
    encoding: str = "utf-8",
    tests_only: bool = False,
) -> Corpus:
    """Read a data set.

    Args:
      layout: how it lies on disk.
      folder: its folder; recordings may also be in `.tar.gz` files in it.
      rate: samples per second to resample to; by default the data set's own.
      unseen: speakers to keep out of training.
      encoding: of the lists that have no byte-order mark.
      tests_only: leave out what is named for training; the rest is the test set, all of it.
    Raises:
      ValueError: a list or the recordings are missing (says which), a broken list (names file and
        line), or no usable recording.
    """
    entries, units, _, joinable = _LAYOUTS[layout]
    return assemble(
        entries(folder, encoding),
        units=units,
        rate=rate or own_rate(layout),
        unseen=unseen,
        joinable=joinable,
        tests_only=tests_only,
    )


def own_rate(layout: Layout) -> int:
    """Samples per second that a layout's recordings are read at by default."""
    return _LAYOUTS[layout][2]


def fsdd(folder: Path, encoding: str = "utf-8") -> list[Entry]:
    """`{digit}_{speaker}_{take}.wav`; takes 0 to 4 are the official test split.

    Source: github.com/Jakobovski/free-spoken-digit-dataset.
    """
    audio = find_audio(folder)
    names, entries = audio.names(), []
    for path, read in audio.items():
        parts = PurePosixPath(path).stem.split("_")
        if len(parts) != 3 or not all(map(_is_number, (parts[0], parts[2]))) or len(parts[0]) > 1:
            raise ValueError(f"fsdd: {path} is not named DIGIT_SPEAKER_TAKE")
        digit, speaker, take = int(parts[0]), parts[1], int(parts[2])
        held = path_split(PurePosixPath(path).parts[:-1]) not in (None, "train")
        split = "test" if take < 5 or held else "train"
        entries.append(Entry(names[path], speaker, DIGITS[digit], read, split))
    return entries


def yesno(folder: Path, encoding: str = "utf-8") -> list[Entry]:
    """`0_1_1_0_1_0_0_1.wav`: eight words, 1 is yes and 0 is no. Source: OpenSLR resource 1."""
    audio = find_audio(folder)
    names, entries = audio.names(), []
    for path, read in audio.items():
        words = PurePosixPath(path).stem.split("_")
        if not words or set(words) - {"0", "1"}:
            raise ValueError(f"yesno: {path} is not named by zeros and ones")
        text = " ".join("yes" if word == "1" else "no" for word in words)
        split = path_split(PurePosixPath(path).parts[:-1])
        entries.append(Entry(names[path], "speaker", text, read, split))
    return entries


def an4(folder: Path, encoding: str = "utf-8") -> list[Entry]:
    """CMU AN4: `etc/an4_{train,test}.{fileids,transcription}`, or a `transcripts.csv`.

    The table has columns file, speaker, words and perhaps num_samples and split. Files are named by
    their path in the folder, or the end of it.
    """
    audio = find_audio(folder)
    if (folder / "transcripts.csv").is_file():
        return _of_table(folder / "transcripts.csv", audio, encoding)
    entries = []
    for split in ("train", "test"):
        paths = folder / "etc" / f"an4_{split}.fileids"
        listed = [line.text for line in lines(paths, encoding)] if paths.is_file() else []
        for where, line in lines(folder / "etc" / f"an4_{split}.transcription", encoding):
            text, _, name = line.rpartition("(")
            name = name.removesuffix(")").strip()
            if not text or not name:
                raise ValueError(f"{where}: not '<s> ... </s> (id)': {line[:60]!r}")
            words = text.replace("<s>", " ").replace("</s>", " ")
            speaker = name.split("-")[1] if name.count("-") == 2 else name
            own = [path for path in listed if PurePosixPath(path).name == name]
            read = audio.find(own[0] if len(own) == 1 else name, where)
            entries.append(Entry(name, speaker, words, read, split))
    return entries


def librispeech(folder: Path, encoding: str = "utf-8") -> list[Entry]:
    """`SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt` beside FLAC files.

    Subsets named train are for training, those named dev or test (or valid, eval and the like) are
    the test sets.
    """
    lists = sorted(folder.rglob("*.trans.txt"))
    if not lists:
        raise ValueError(f"librispeech: no *.trans.txt under {folder}")
    entries = []
    for path in lists:
        split = path_split(path.relative_to(folder.parent).parts[:-1])
        for where, line in lines(path, encoding):
            name, text = head(line)
            if name.count("-") != 2:
                raise ValueError(f"{where}: {name!r} is not SPEAKER-CHAPTER-NUMBER")
            read = _file(path.parent / f"{name}.flac")
            entries.append(Entry(name, name.split("-")[0], text, read, split))
    return entries


def kaldi(folder: Path, encoding: str = "utf-8") -> list[Entry]:
    """`wav.scp`, `text`, perhaps `utt2spk` and `segments`; or those in `train/`, `test/`, ...

    What a subfolder's name says decides its split. Commands in `wav.scp` (lines that end in `|`)
    are not run; such recordings are skipped.
    """
    parts: list[tuple[Split | None, Path]] = [(None, folder)]
    if not (folder / "wav.scp").is_file():
        inside = sorted(path.parent for path in folder.glob("*/wav.scp"))
        parts = [(named_split(part.name), part) for part in inside] or parts
    entries = []
    for split, part in parts:
        recordings, texts = pairs(part / "wav.scp", encoding), pairs(part / "text", encoding)
        speakers = _optional(part / "utt2spk", encoding) or {}
        segments = _optional(part / "segments", encoding)
        for name, (_, text) in texts.items():
            recording, cut = name, None
            if segments is not None:
                recording, cut = _segment(segments.get(name), name, part / "segments")
            target = recordings[recording].text if recording in recordings else ""
            read = _file(part / target) or _file(folder / target) if target else None
            problem = (
                "no such file: a command in wav.scp is not run" if target.endswith("|") else ""
            )
            speaker = speakers[name].text if name in speakers else name
            entries.append(Entry(name, speaker, text, read, split, cut=cut, problem=problem))
    return entries


def manifest(folder: Path, encoding: str = "utf-8") -> list[Entry]:
    """JSON lines as NeMo has them: `audio_filepath` and `text`, perhaps `duration`, `offset` (of a
    piece of the file, in seconds), `speaker` and `split`.

    `folder` is the list itself, or a folder of lists (`*.json`, `*.jsonl`); paths are relative to
    it. A list whose name holds train, or valid, val, dev, test, eval or heldout, says the split.
    """
    lists = [folder] if folder.is_file() else sorted([*folder.glob("*.json*")])
    if not lists:
        raise ValueError(f"manifest: no list (*.json, *.jsonl) in {folder}")
    entries = []
    for path in lists:
        by_file = named_split(path.stem)
        for line in lines(path, encoding):
            entries.append(_of_row(_json_row(line), line.where, path, by_file))
    return entries


_LAYOUTS: dict[Layout, tuple[Callable[[Path, str], list[Entry]], Units, int, bool]] = {
    "fsdd": (fsdd, "words", 8000, True),
    "yesno": (yesno, "words", 8000, False),
    "an4": (an4, "characters", 16000, False),
    "librispeech": (librispeech, "characters", 16000, False),
    "kaldi": (kaldi, "characters", 16000, False),
    "manifest": (manifest, "characters", 16000, False),
}


def _of_table(path: Path, audio: Recordings, encoding: str) -> list[Entry]:
    entries = []
    for where, row in table(path, ("file", "speaker", "words"), encoding):
        samples = number(row.get("num_samples"), where, "num_samples", whole=True, least=1)
        name = row["file"].replace("\\", "/")
        split = _split_of(row, where) or path_split(PurePosixPath(name).parts[:-1])
        entries.append(
            Entry(
                name,
                row["speaker"],
                row["words"],
                audio.find(name, where),
                split,
                samples=None if samples is None else int(samples),
            )
        )
    return entries


def _json_row(line: Line) -> dict[str, Any]:
    try:
        row = parse_json(line.text, "")
    except ValueError as error:
        raise ValueError(f"{line.where}: not JSON ({error}): {line.text[:60]!r}") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{line.where}: a line must be a JSON object with audio_filepath and text, got "
            f"{line.text[:60]!r}"
        )
    return row


def _of_row(row: dict[str, Any], where: str, path: Path, by_file: Split | None) -> Entry:
    given = text_of(row, where, "audio_filepath")
    if not given:
        raise ValueError(f"{where}: audio_filepath is empty")
    offset = number(row.get("offset"), where, "offset")
    seconds = number(row.get("duration"), where, "duration")
    name, cut = given, None
    if offset is not None:
        name = f"{given}@{offset:g}" if offset else given
        cut = offset, math.inf if seconds is None else offset + seconds
        seconds = None
    split = _split_of(row, where) or by_file
    if split is None and not Path(given).is_absolute():
        split = path_split(PurePosixPath(given).parts[:-1])
    return Entry(
        name,
        given if row.get("speaker") is None else str(row["speaker"]),
        text_of(row, where, "text"),
        _file(path.parent / given),
        split,
        seconds=seconds,
        cut=cut,
    )


def _split_of(row: dict[str, Any], where: str) -> Split | None:
    for column in SPLIT_COLUMNS:
        if split := stated_split(row.get(column), where):
            return split
    return None


def _segment(line: Line | None, name: str, path: Path) -> tuple[str, tuple[float, float]]:
    """(recording, its first and last second) of an utterance; an end of -1 is that of the file."""
    wanted = f"{path}: no recording, start and end for {name}"
    if line is None:
        raise ValueError(wanted)
    try:
        recording, start, end = line.text.split()
        first = number(start, line.where, "start")
        last = number(end, line.where, "end", least=-1)
    except ValueError:
        place = line.where.rpartition(", ")[2]
        raise ValueError(f"{wanted} in {place}: {line.text[:60]!r}") from None
    assert first is not None and last is not None  # a word is not empty
    return recording, (first, math.inf if last == -1 else last)


def _optional(path: Path, encoding: str) -> dict[str, Line] | None:
    return pairs(path, encoding) if path.is_file() else None


def _file(path: Path) -> Reader | None:
    try:
        return path.read_bytes if path.is_file() else None
    except OSError:  # a name that no file can have
        return None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
