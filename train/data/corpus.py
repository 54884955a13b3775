"""What a data set gives to training: utterances, how they are split, and what had to be skipped."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from cmjax.models.asr.audio import read_audio
from cmjax.models.asr.containers import BadAudio
from cmjax.models.asr.text import Units, normalise
from train.data.audio import Reader, Utterance
from train.data.splits import Split


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A recording left out, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a data set's list: where a recording is, what is said, what the list claims.

    Attributes:
      name, speaker, text: of the utterance; the text as written.
      read: returns the file, or None where the file is missing.
      split: what the data set says, or None.
      samples, seconds: claimed length, or None.
      cut: first and last second of the utterance in its file, or None for all of it.
      problem: why it cannot be used, where the list says so.
    """

    name: str
    speaker: str
    text: str
    read: Reader | None
    split: Split | None = None
    samples: int | None = None
    seconds: float | None = None
    cut: tuple[float, float] | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Utterances by split.

    Attributes:
      train: to learn from.
      tests: named test sets.
      units: labels that suit it: words for a closed vocabulary.
      rate: samples per second.
      joinable: of the utterances that are single words, strings are joined.
      skipped: what was left out.
    """

    train: tuple[Utterance, ...]
    tests: dict[str, tuple[Utterance, ...]]
    units: Units
    rate: int
    joinable: bool = False
    skipped: tuple[Skipped, ...] = ()


def read_entries(
    entries: Iterable[Entry], rate: int
) -> Iterator[tuple[Entry, Utterance] | Skipped]:
    """Every entry with its utterance, or what is wrong with it."""
    for entry in entries:
        try:
            yield entry, _read(entry, rate)
        except BadAudio as error:
            yield Skipped(entry.name, str(error))


def assemble(
    entries: Sequence[Entry],
    *,
    units: Units,
    rate: int,
    unseen: Sequence[str] = (),
    joinable: bool = False,
    tests_only: bool = False,
) -> Corpus:
    """Read and split a list of recordings.

    The test sets are the data set's own where it has some: all that it names as held out, dev and
    test apart. Else the test set is every fifth speaker if there are five or more, so that no
    speaker is in both; else every fifth utterance by name. The order is that of names, however the
    recordings are packed.

    Args:
      entries: the list.
      units, rate, joinable: of the corpus.
      unseen: speakers to keep out of training; all they say is the test set "unseen".
      tests_only: what is named for training is left out unread, and all else is tested on.
    Raises:
      ValueError: an unknown speaker in `unseen`, or nothing left to use; says what was skipped.
    """
    speakers = sorted({entry.speaker for entry in entries})
    unknown = sorted(set(unseen) - set(speakers))
    if unknown:
        raise ValueError(
            f"unseen: no speaker {', '.join(unknown)}; there are {', '.join(speakers)}"
        )
    if tests_only:
        entries = [
            dataclasses.replace(entry, split=entry.split or "test")
            for entry in entries
            if entry.split != "train"
        ]
        if not entries:
            raise ValueError("no test set: every recording is named for training")
    kept, skipped = [], []
    for item in read_entries(_ordered(entries), rate):
        (skipped if isinstance(item, Skipped) else kept).append(item)
    if not kept:
        raise ValueError("no usable recording: " + summary(skipped))
    stated = {entry.split for entry in entries} - {None}
    names = [entry.name for entry, _ in kept]
    tested = set(speakers[::5]) if len(speakers) >= 5 else set()
    by_turn = set(names[::5])
    parts: dict[str, list[Utterance]] = {"train": [], "test": [], "dev": [], "unseen": []}
    for entry, utterance in kept:
        if entry.speaker in unseen:
            part = "unseen"
        elif entry.split is not None:
            part = entry.split
        elif "train" in stated:
            reason = "is in no part of the data set that is named for training or testing"
            skipped.append(Skipped(entry.name, reason))
            continue
        elif stated:
            part = "train"
        else:
            held = entry.speaker in tested if tested else entry.name in by_turn
            part = "test" if held else "train"
        parts[part].append(utterance)
    train = tuple(parts.pop("train"))
    if not parts["test"]:
        parts["test"] = parts.pop("dev")
    tests = {name: tuple(utterances) for name, utterances in parts.items() if utterances}
    return Corpus(
        train=train,
        tests=tests,
        units=units,
        rate=rate,
        joinable=joinable,
        skipped=tuple(skipped),
    )


def development(corpus: Corpus) -> Corpus:
    """A corpus to choose options on: its tests are gone, every fifth training utterance is one.

    So what is chosen has not seen the test sets. Speakers and words are all in both parts.

    Raises: ValueError with fewer than five training utterances.
    """
    order = sorted(corpus.train, key=lambda u: (u.text, u.speaker, u.name))
    if len(order) < 5:
        raise ValueError(f"--development needs 5 training utterances, there are {len(order)}")
    held = {utterance.name for utterance in order[4::5]}
    return dataclasses.replace(
        corpus,
        train=tuple(utterance for utterance in corpus.train if utterance.name not in held),
        tests={"development": tuple(order[4::5])},
    )


def shared(corpus: Corpus, digests: Iterable[str]) -> dict[str, list[str]]:
    """By test set, the names of utterances whose recordings are among `digests`."""
    known = set(digests)
    found = {
        name: [item.name for item in utterances if item.digest() in known]
        for name, utterances in corpus.tests.items()
    }
    return {name: names for name, names in found.items() if names}


def summary(skipped: Sequence[Skipped], most: int = 5) -> str:
    """The first few of what was skipped, in one line."""
    shown = "; ".join(f"{item.name}: {item.reason}" for item in skipped[:most])
    return shown + (f"; and {len(skipped) - most} more" if len(skipped) > most else "")


def _ordered(entries: Iterable[Entry]) -> list[Entry]:
    """By name, and names that several share with a number behind them."""
    seen: Counter[str] = Counter()
    ordered = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        seen[entry.name] += 1
        if seen[entry.name] > 1:
            entry = dataclasses.replace(entry, name=f"{entry.name}#{seen[entry.name]}")
        ordered.append(entry)
    return ordered


def _read(entry: Entry, rate: int) -> Utterance:
    if entry.problem:
        raise BadAudio(entry.problem)
    if entry.read is None:
        raise BadAudio("no such file")
    text = normalise(entry.text)
    if not text:
        raise BadAudio("has no transcript")
    try:
        data = entry.read()
    except OSError as error:
        raise BadAudio(f"cannot be read: {error.strerror}") from None
    samples = read_audio(data, rate, samples=entry.samples, seconds=entry.seconds)
    if entry.cut is not None:
        samples = _cut(samples, rate, *entry.cut)
    return Utterance(entry.name, entry.speaker, text, samples)


def _cut(samples, rate: int, start: float, end: float):
    """The samples from second `start` to `end`, which may be infinite; 20 ms more are forgiven."""
    last = len(samples) if end == math.inf else round(min(end * rate, 1e15))
    first = round(min(start * rate, 1e15))
    if not 0 <= first < last <= len(samples) + rate // 50:
        raise BadAudio(
            f"its piece from {start:g} to {end:g} s lies outside {len(samples) / rate:.2f} s"
        )
    return samples[first:last]
