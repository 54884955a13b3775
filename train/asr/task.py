"""From a configuration to what training needs: corpus, labels, front end and an untrained model."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.features import LogMel
from cmjax.models.asr.recognizer import new_network
from cmjax.models.asr.text import Alphabet, Units, normalise
from train.asr.config import Config
from train.asr.learner import features_of
from train.data import folders, synthetic
from train.data.audio import Utterance
from train.data.batches import Framing, fitting, test_batches
from train.data.corpus import Corpus, development
from train.data.lists import read_list
from train.data.pauses import with_cut_words
from train.data.strings import strings_of

TEST_STRINGS = 1000  # about 3,500 words: one error is 0.03 %
_MEASURED = 512  # utterances whose bands are measured, at least


@dataclasses.dataclass(frozen=True)
class Task:
    """What to learn.

    Attributes:
      corpus: utterances that the model can spell; test sets of joined strings are among the tests.
      framing: front end and labels.
    """

    corpus: Corpus
    framing: Framing

    def model(self, config: Config) -> AcousticModel:
        """The network of the configuration, untrained."""
        framing = self.framing
        return new_network(config.sizes, framing.front, framing.alphabet, config.seed)


def prepare(
    config: Config,
    alphabet: Alphabet | None = None,
    *,
    rate: int | None = None,
    tests_only: bool = False,
) -> Task:
    """Read the data and fix labels and front end.

    Args:
      config: of the run.
      alphabet: labels of a model trained before; by default those of the training data.
      rate: samples per second of a model trained before.
      tests_only: read what is there to test on: all that is not named for training.
    Raises:
      ValueError: no test set is left, or an alphabet that cannot be read; see also `folders.load`.
    """
    corpus = _corpus(config, rate or config.rate, tests_only)
    if config.development and not tests_only:
        corpus = development(corpus)
    if alphabet is None:
        alphabet = _alphabet(config, corpus)
    front = LogMel(sample_rate=corpus.rate, bands=config.bands)
    framing = Framing(front, alphabet, config.stride)
    if config.cut_words and alphabet.units == "words":
        corpus = with_cut_words(corpus)
    corpus = fitting(corpus, framing)
    if not corpus.tests:
        raise ValueError(_no_tests(corpus, config))
    if corpus.joinable:
        joined = {
            f"{name} strings": tuple(
                strings_of(takes, TEST_STRINGS, corpus.rate, config.strings, seed=1)
            )
            for name, takes in corpus.tests.items()
            if all(len(take.text.split()) == 1 for take in takes)
        }
        corpus = dataclasses.replace(corpus, tests={**corpus.tests, **joined})
    return Task(corpus, framing)


def _corpus(config: Config, rate: int | None, tests_only: bool) -> Corpus:
    """The data set of the configuration, and its further test set."""
    if config.data == "synthetic":
        return synthetic.digits(voices=config.voices, unseen=config.voices // 4)
    assert config.data_dir is not None  # Config has checked it
    corpus = folders.load(
        config.data,
        config.data_dir,
        rate=rate,
        unseen=config.unseen,
        encoding=config.encoding,
        tests_only=tests_only,
    )
    if config.test_dir is None:
        return corpus
    extra = folders.load(config.data, config.test_dir, rate=corpus.rate, encoding=config.encoding)
    everything = (*extra.train, *(u for test in extra.tests.values() for u in test))
    return dataclasses.replace(
        corpus,
        tests={**corpus.tests, "test_dir": everything},
        skipped=corpus.skipped + extra.skipped,
    )


def _alphabet(config: Config, corpus: Corpus) -> Alphabet:
    units = config.units or corpus.units
    texts = [utterance.text for utterance in corpus.train]
    if config.alphabet not in ("auto", "letters", "data"):
        return _alphabet_file(Path(config.alphabet), units, config.encoding)
    if units == "words" and config.alphabet != "letters":
        return Alphabet.of_words(texts)
    letters = Alphabet.letters()
    spelled = sum(set(text) <= set(letters.symbols) for text in texts)
    if config.alphabet == "letters" or (config.alphabet == "auto" and spelled >= 0.95 * len(texts)):
        return letters
    return Alphabet.of_characters(texts)


def _alphabet_file(path: Path, units: Units, encoding: str) -> Alphabet:
    """One symbol a line; `<space>`, or a line of one space, is the space."""
    symbols: dict[str, int] = {}
    for number, line in enumerate(re.split("\r\n|\r|\n", read_list(path, encoding)), 1):
        symbol = " " if line in (" ", "<space>") else line.strip(" \t")
        if not symbol:
            continue
        spelled = symbol if symbol == " " else normalise(symbol)
        if symbol != spelled or (units == "characters" and len(symbol) > 1):
            wanted = "one character" if units == "characters" else "one word"
            raise ValueError(
                f"--alphabet {path}, line {number}: {wanted} in lower case is wanted, got {line!r}"
            )
        if symbol in symbols:
            raise ValueError(
                f"--alphabet {path}, line {number}: {symbol!r} stands in line {symbols[symbol]} too"
            )
        symbols[symbol] = number
    if not symbols:
        raise ValueError(f"--alphabet {path}: no symbols")
    return Alphabet(units, tuple(symbols))


def _no_tests(corpus: Corpus, config: Config) -> str:
    if config.evaluate_only:
        return f"no test set: every recording in {config.data_dir} is named for training"
    return (
        f"no test set: all {len(corpus.train)} usable utterances are for training. Name one with "
        "--test-dir, keep speakers for it with --unseen, or a fifth with --development"
    )


def measure_statistics(
    utterances: Sequence[Utterance], framing: Framing, rate: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every band over (a sample of) the training data."""
    chosen = utterances[:: max(1, len(utterances) // _MEASURED)]
    total = squares = np.zeros(framing.front.bands)
    count = 0
    for _, batch in test_batches(chosen, framing, 16, rate):
        features, frames = (np.asarray(x, np.float64) for x in features_of(batch, framing))
        inside = (np.arange(features.shape[1]) < frames[:, None])[..., None]
        total = total + (features * inside).sum(axis=(0, 1))
        squares = squares + (np.square(features) * inside).sum(axis=(0, 1))
        count += inside.sum()
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0))
