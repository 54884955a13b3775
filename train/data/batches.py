"""Batches of fixed shapes, the same for the same seed and step: what exact resumption rests on.

An epoch uses every take once. What it holds is planned first (which takes, in which order), and
every item of the plan has random numbers of its own, so that batch n is the same however one came
to it. Lengths are padded up to a few sizes, one compiled program each.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from cmjax.models.asr.ctc import needed_frames
from cmjax.models.asr.features import LogMel
from cmjax.models.asr.text import Alphabet
from train.data.audio import Utterance
from train.data.corpus import Corpus, Skipped
from train.data.perturb import Perturb, behind_remnant, perturb
from train.data.strings import Strings, join

SIZES_S = (2.0, 4.0, 8.0, 16.0, 35.0)
_POOL = 16  # batches among which utterances of like length are looked for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step computes on.

    Attributes:
      samples: waveforms, fractions of full scale, zeros behind `lengths`.
      lengths: samples of each; 0 for a row that only fills up the batch.
      labels: zeros behind `counts`.
      counts: labels of each.
    """

    samples: Float[Array | np.ndarray, "batch time"]
    lengths: Int[Array | np.ndarray, "batch"]
    labels: Int[Array | np.ndarray, "batch most"]
    counts: Int[Array | np.ndarray, "batch"]

    @property
    def time(self) -> int:
        """Samples that the rows are padded to."""
        return self.samples.shape[-1]

    def lasting(self, time: int) -> "Batch":
        """The same on `time` samples, which are as many or more."""
        samples = np.pad(np.asarray(self.samples), [(0, 0), (0, time - self.time)])
        return dataclasses.replace(self, samples=samples)


@dataclasses.dataclass(frozen=True)
class Framing:
    """How utterances become the inputs and labels of a model.

    Attributes:
      front: the front end.
      alphabet: the labels.
      stride: feature frames per output frame.
    """

    front: LogMel
    alphabet: Alphabet
    stride: int

    def outputs(self, samples: int) -> int:
        """Output frames of so many samples."""
        return -(-int(self.front.frames(np.int64(samples))) // self.stride)

    def least_samples(self, labels: Sequence[int]) -> int:
        """Samples below which these labels have no path."""
        outputs = max(1, needed_frames(labels))
        return self.front.samples((outputs - 1) * self.stride + 1)


def fitting(corpus: Corpus, framing: Framing) -> Corpus:
    """Without the utterances that the model cannot spell or whose labels need more frames.

    Raises: ValueError if no training utterance, and no test utterance, is left.
    """
    skipped = list(corpus.skipped)

    def kept(utterances: tuple[Utterance, ...]) -> tuple[Utterance, ...]:
        out = []
        for utterance in utterances:
            try:
                labels = framing.alphabet.encode(utterance.text)
            except ValueError as error:
                skipped.append(Skipped(utterance.name, str(error)))
                continue
            samples = len(utterance.samples)
            if samples < framing.least_samples(labels):
                skipped.append(
                    Skipped(
                        utterance.name,
                        f"its {len(labels)} labels need {needed_frames(labels)} output frames, "
                        f"{samples} samples give {framing.outputs(samples)}",
                    )
                )
            elif samples > SIZES_S[-1] * corpus.rate:
                seconds = samples / corpus.rate
                skipped.append(
                    Skipped(utterance.name, f"lasts {seconds:.1f} s, over {SIZES_S[-1]:g} s")
                )
            else:
                out.append(utterance)
        return tuple(out)

    train = kept(corpus.train)
    tests = {name: kept(utterances) for name, utterances in corpus.tests.items()}
    tests = {name: utterances for name, utterances in tests.items() if utterances}
    if not train and not tests:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in skipped[:3])
        raise ValueError(f"no utterance fits the model: {reasons}")
    return dataclasses.replace(corpus, train=train, tests=tests, skipped=tuple(skipped))


class TrainingStream:
    """Batch n of training, for any n; batches are made one ahead in a thread."""

    def __init__(
        self,
        corpus: Corpus,
        framing: Framing,
        *,
        batch: int,
        strings: Strings,
        augment: Perturb | None,
        seed: int,
        rows: slice = slice(None),
    ):
        """`augment=None` leaves waveforms as they are; `rows` of a batch are those that `run`
        makes."""
        if not corpus.train:
            raise ValueError("TrainingStream: the corpus has no training utterance")
        self._corpus, self._framing, self._batch = corpus, framing, batch
        self._strings, self._augment, self._seed = strings, augment, seed
        self._rows = rows
        self._ends: list[int] = []
        self._plans: dict[int, list[list[tuple[int, ...]]]] = {}
        labels = [len(framing.alphabet.encode(item.text)) for item in corpus.train]
        single = [n for n, item in zip(labels, corpus.train, strict=True) if _joins(corpus, item)]
        self._most = max(*labels, max(single, default=0) * strings.longest)

    def at(self, step: int, rows: slice = slice(None)) -> tuple[tuple[str, ...], Batch]:
        """(names of the batch, those of its rows) of number `step`; the rows are padded to what
        they need themselves."""
        epoch, number = self._locate(step)
        items = self._plan(epoch)[number]
        made = [self._row(epoch, item) for item in items[rows]]
        waves = [wave for _, wave in made]
        labels = [self._framing.alphabet.encode(text) for text, _ in made]
        count = len(range(self._batch)[rows])
        batch = pack(waves, labels, self._framing, count, self._corpus.rate, self._most)
        return tuple(self._name(item) for item in items), batch

    def epoch(self, step: int) -> float:
        """How often the data has been seen before `step`."""
        epoch, number = self._locate(step)
        return epoch + number / len(self._plan(epoch))

    def run(self, first: int, last: int) -> Iterator[tuple[int, tuple[str, ...], Batch]]:
        """Batches `first` to `last - 1` with their numbers, as `at` gives them."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.at, first, self._rows) if first < last else None
            for step in range(first, last):
                assert ahead is not None
                names, batch = ahead.result()
                more = step + 1 < last
                ahead = pool.submit(self.at, step + 1, self._rows) if more else None
                yield step, names, batch

    def _locate(self, step: int) -> tuple[int, int]:
        while not self._ends or self._ends[-1] <= step:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._plan(len(self._ends))))
        epoch = bisect.bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def _plan(self, epoch: int) -> list[list[tuple[int, ...]]]:
        """Batches of items; an item is the takes it is joined from."""
        if epoch not in self._plans:
            random = np.random.default_rng([self._seed, epoch])
            items = self._items(random)
            size = [sum(len(self._corpus.train[i].samples) for i in item) for item in items]
            order = random.permutation(len(items))
            pool = self._batch * _POOL
            batches = []
            for at in range(0, len(order), pool):
                alike = sorted(order[at : at + pool], key=lambda i: size[i])
                batches += [
                    [items[i] for i in alike[j : j + self._batch]]
                    for j in range(0, len(alike), self._batch)
                ]
            shuffled = [batches[i] for i in random.permutation(len(batches))]
            self._plans = {epoch: shuffled, **dict(list(self._plans.items())[:1])}
        return self._plans[epoch]

    def _items(self, random: np.random.Generator) -> list[tuple[int, ...]]:
        train = self._corpus.train
        joined = [i for i, take in enumerate(train) if _joins(self._corpus, take)]
        single = set(joined)
        items = [(i,) for i in range(len(train)) if i not in single]
        for speaker in sorted({train[i].speaker for i in joined}):
            own = [i for i in joined if train[i].speaker == speaker]
            left = [own[i] for i in random.permutation(len(own))]
            while left:
                count = random.integers(self._strings.shortest, self._strings.longest + 1)
                items.append(tuple(left[:count]))
                left = left[count:]
        return items

    def _name(self, item: tuple[int, ...]) -> str:
        return "+".join(self._corpus.train[i].name for i in item)

    def _row(self, epoch: int, item: tuple[int, ...]) -> tuple[str, np.ndarray]:
        """(text, waveform)."""
        random = np.random.default_rng([self._seed, epoch, 1 + item[0]])
        takes = [self._corpus.train[i] for i in item]
        if _joins(self._corpus, takes[0]):
            string = join(takes, self._corpus.rate, self._strings, random)
            text, wave = string.text, string.wave
        else:
            text, wave = takes[0].text, takes[0].waveform()
        if self._augment is not None:
            if random.uniform() < self._augment.remnant_share:
                own = [other for other in self._corpus.train if other.speaker == takes[0].speaker]
                other = own[random.integers(len(own))].waveform()
                wave = behind_remnant(wave, other, self._corpus.rate, random)
            wave = perturb(wave, self._augment, random)
        return text, wave


def _joins(corpus: Corpus, take: Utterance) -> bool:
    """Whether strings are joined of this take."""
    return corpus.joinable and len(take.text.split()) == 1


def test_batches(
    utterances: Sequence[Utterance], framing: Framing, batch: int, rate: int
) -> Iterator[tuple[list[int], Batch]]:
    """(indices, batch) over all utterances, those of like length together."""
    order = sorted(range(len(utterances)), key=lambda i: len(utterances[i].samples))
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        waves = [utterances[i].waveform() for i in chosen]
        labels = [framing.alphabet.encode(utterances[i].text) for i in chosen]
        yield chosen, pack(waves, labels, framing, batch, rate, max(map(len, labels)))


def pack(
    waves: Sequence[np.ndarray],
    labels: Sequence[Sequence[int]],
    framing: Framing,
    rows: int,
    rate: int,
    most: int,
) -> Batch:
    """Pad waveforms and labels to a batch of `rows`, its time to one of `SIZES_S`.

    A waveform that augmentation left too short for its labels gets silence behind it.
    """
    sizes = [max(len(w), framing.least_samples(own)) for w, own in zip(waves, labels, strict=True)]
    longest = max(sizes, default=0) / rate
    seconds = next((size for size in SIZES_S if size >= longest), longest)
    batch = Batch(
        samples=np.zeros((rows, round(seconds * rate)), np.float32),
        lengths=np.zeros(rows, np.int32),
        labels=np.zeros((rows, most), np.int32),
        counts=np.zeros(rows, np.int32),
    )
    for row, (wave, own) in enumerate(zip(waves, labels, strict=True)):
        batch.samples[row, : len(wave)] = wave
        batch.lengths[row] = sizes[row]
        batch.labels[row, : len(own)] = own
        batch.counts[row] = len(own)
    return batch
