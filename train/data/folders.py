"""Data sets as they lie on disk: FSDD, yesno, AN4, LibriSpeech, Kaldi folders, JSON-lines lists.

Each loader returns the entries of its layout; `load` reads, checks and splits them.
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from cmjax.models.asr.text import Units
from train.data.audio import by_name, find_audio
from train.data.corpus import Corpus, Entry, assemble

Layout = Literal["fsdd", "yesno", "an4", "librispeech", "kaldi", "manifest"]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load(
    layout: Layout, folder: Path, *, rate: int | None = None, unseen: Sequence[str] = ()
) -> Corpus:
    """Read a data set.

    Args:
      layout: how it lies on disk.
      folder: its folder; recordings may also be in `.tar.gz` files in it.
      rate: samples per second to resample to; by default the data set's own.
      unseen: speakers to keep out of training.
    Raises:
      ValueError: a list or the recordings are missing (says which), a broken list (names file and
        line), or no usable recording.
    """
    entries, units, own_rate, joinable = _LAYOUTS[layout]
    return assemble(
        entries(folder), units=units, rate=rate or own_rate, unseen=unseen, joinable=joinable
    )


def fsdd(folder: Path) -> list[Entry]:
    """`{digit}_{speaker}_{take}.wav`; takes 0 to 4 are the official test split.

    Source: github.com/Jakobovski/free-spoken-digit-dataset.
    """
    entries = []
    for path, read in find_audio(folder).items():
        parts = Path(path).stem.split("_")
        if len(parts) != 3 or not (parts[0].isdigit() and parts[2].isdigit()) or len(parts[0]) > 1:
            raise ValueError(f"fsdd: {path} is not named DIGIT_SPEAKER_TAKE")
        digit, speaker, take = int(parts[0]), parts[1], int(parts[2])
        split = "test" if take < 5 else "train"
        entries.append(Entry(Path(path).name, speaker, DIGITS[digit], read, split))
    return entries


def yesno(folder: Path) -> list[Entry]:
    """`0_1_1_0_1_0_0_1.wav`: eight words, 1 is yes and 0 is no. Source: OpenSLR resource 1."""
    entries = []
    for path, read in find_audio(folder).items():
        words = Path(path).stem.split("_")
        if not words or set(words) - {"0", "1"}:
            raise ValueError(f"yesno: {path} is not named by zeros and ones")
        text = " ".join("yes" if word == "1" else "no" for word in words)
        entries.append(Entry(Path(path).name, "speaker", text, read))
    return entries


def an4(folder: Path) -> list[Entry]:
    """CMU AN4: `etc/an4_{train,test}.{fileids,transcription}`, or a `transcripts.csv`.

    The table has columns file, speaker, words and perhaps num_samples.
    """
    audio = find_audio(folder)
    table = folder / "transcripts.csv"
    if table.is_file():
        where = {Path(path).name: path for path in audio}
        return [
            Entry(
                row["file"],
                row["speaker"],
                row["words"],
                audio.get(where.get(row["file"], "")),
                samples=int(row["num_samples"]) if row.get("num_samples") else None,
            )
            for row in _table(table, ("file", "speaker", "words"))
        ]
    where = by_name(audio)
    entries = []
    for split in ("train", "test"):
        lines = _lines(folder / "etc" / f"an4_{split}.transcription")
        for number, line in lines:
            text, _, name = line.rpartition("(")
            name = name.removesuffix(")").strip()
            if not text or not name:
                place = f"{folder}/etc/an4_{split}.transcription, line {number}"
                raise ValueError(f"{place}: not '<s> ... </s> (id)': {line[:60]!r}")
            words = text.replace("<s>", " ").replace("</s>", " ")
            speaker = name.split("-")[1] if name.count("-") == 2 else name
            entries.append(Entry(name, speaker, words, audio.get(where.get(name, "")), split))
    return entries


def librispeech(folder: Path) -> list[Entry]:
    """`SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt` beside FLAC files.

    Subsets named train are for training, those named dev or test are the test set.
    """
    lists = sorted(folder.rglob("*.trans.txt"))
    if not lists:
        raise ValueError(f"librispeech: no *.trans.txt under {folder}")
    entries = []
    for path in lists:
        above = " ".join(path.relative_to(folder.parent).parts)
        split = "train" if "train" in above else "test" if {"dev", "test"} & _stems(above) else None
        for number, line in _lines(path):
            name, _, text = line.partition(" ")
            if name.count("-") != 2:
                raise ValueError(f"{path}, line {number}: {name!r} is not SPEAKER-CHAPTER-NUMBER")
            read = _file(path.parent / f"{name}.flac")
            entries.append(Entry(name, name.split("-")[0], text, read, split))
    return entries


def kaldi(folder: Path) -> list[Entry]:
    """`wav.scp`, `text`, perhaps `utt2spk` and `segments`; or those in `train/` and `test/`.

    Commands in `wav.scp` (lines that end in `|`) are not run; such recordings are skipped.
    """
    if not (folder / "wav.scp").is_file() and (folder / "train" / "wav.scp").is_file():
        splits: list = [("train", folder / "train")]
        splits += [("test", folder / "test")] if (folder / "test").is_dir() else []
    else:
        splits = [(None, folder)]
    entries = []
    for split, part in splits:
        recordings, texts = _pairs(part / "wav.scp"), _pairs(part / "text")
        speakers = _pairs(part / "utt2spk") if (part / "utt2spk").is_file() else {}
        segments = _pairs(part / "segments") if (part / "segments").is_file() else None
        for name, text in texts.items():
            recording, cut = name, None
            if segments is not None:
                try:
                    recording, start, end = segments.get(name, "").split()
                    cut = float(start), float(end)
                except ValueError:
                    raise ValueError(
                        f"{part}/segments: no recording, start and end for {name}"
                    ) from None
            target = recordings.get(recording, "")
            read = _file(part / target) or _file(folder / target) if target else None
            entries.append(Entry(name, speakers.get(name, name), text, read, split, cut=cut))
    return entries


def manifest(folder: Path) -> list[Entry]:
    """JSON lines with `audio_filepath` and `text`, perhaps `duration`, `speaker` and `split`.

    `folder` is the list itself, or a folder of lists (`*.json`, `*.jsonl`); paths are relative to
    it. A list whose name holds "train", "test" or "dev" says the split.
    """
    lists = [folder] if folder.is_file() else sorted([*folder.glob("*.json*")])
    if not lists:
        raise ValueError(f"manifest: no list (*.json, *.jsonl) in {folder}")
    entries = []
    for path in lists:
        stems = _stems(path.stem)
        by_file = "train" if "train" in stems else "test" if {"test", "dev"} & stems else None
        for number, line in _lines(path):
            try:
                row = json.loads(line)
                name, text = str(row["audio_filepath"]), str(row["text"])
                seconds = float(row["duration"]) if "duration" in row else None
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error!r} in {line[:80]!r}") from None
            split = {"dev": "test"}.get(row.get("split"), row.get("split")) or by_file
            if split not in (None, "train", "test"):
                raise ValueError(f"{path}, line {number}: split must be train, dev or test")
            speaker = str(row.get("speaker", name))
            read = _file(path.parent / name)
            entries.append(Entry(name, speaker, text, read, split, seconds=seconds))
    return entries


_LAYOUTS: dict[Layout, tuple[Callable[[Path], list[Entry]], Units, int, bool]] = {
    "fsdd": (fsdd, "words", 8000, True),
    "yesno": (yesno, "words", 8000, False),
    "an4": (an4, "characters", 16000, False),
    "librispeech": (librispeech, "characters", 16000, False),
    "kaldi": (kaldi, "characters", 16000, False),
    "manifest": (manifest, "characters", 16000, False),
}


def _file(path: Path) -> Callable[[], bytes] | None:
    return path.read_bytes if path.is_file() else None


def _stems(text: str) -> set[str]:
    return set(text.replace("-", " ").replace("_", " ").replace(".", " ").split())


def _lines(path: Path) -> list[tuple[int, str]]:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _pairs(path: Path) -> dict[str, str]:
    pairs = {}
    for number, line in _lines(path):
        name, _, rest = line.partition(" ")
        if name in pairs:
            raise ValueError(f"{path}, line {number}: {name!r} for the second time")
        pairs[name] = rest.strip()
    return pairs


def _table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}")
    return rows
