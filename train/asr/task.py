"""From a configuration to what training needs: corpus, labels, front end and an untrained model."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import nnx

from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.dfsmn import ConvDFSMN
from cmjax.models.asr.features import LogMel
from cmjax.models.asr.text import Alphabet
from cmjax.models.asr.wav2letter import Wav2letter
from train.asr.config import Config
from train.asr.learner import features_of
from train.data import folders, synthetic
from train.data.audio import Utterance
from train.data.batches import Framing, fitting, test_batches
from train.data.corpus import Corpus, development
from train.data.pauses import with_cut_words
from train.data.strings import strings_of

TEST_STRINGS = 1000  # about 3,500 words: one error is 0.03 %


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
        rngs = nnx.Rngs(config.seed)
        sizes = {"inputs": self.framing.front.bands, "outputs": self.framing.alphabet.size}
        if config.model == "dfsmn":
            return ConvDFSMN(config.dfsmn, **sizes, rngs=rngs)
        return Wav2letter(config.wav2letter, **sizes, rngs=rngs)


def prepare(config: Config, alphabet: Alphabet | None = None) -> Task:
    """Read the data and fix labels and front end.

    Args:
      config: of the run.
      alphabet: labels of a model trained before; by default those of the training data.
    Raises:
      ValueError: see `folders.load`.
    """
    if config.data == "synthetic":
        corpus = synthetic.digits(voices=config.voices, unseen=config.voices // 4)
    else:
        assert config.data_dir is not None  # Config has checked it
        corpus = folders.load(config.data, config.data_dir, rate=config.rate, unseen=config.unseen)
    if config.test_dir is not None and config.data != "synthetic":
        extra = folders.load(config.data, config.test_dir, rate=corpus.rate)
        everything = (*extra.train, *(u for test in extra.tests.values() for u in test))
        corpus = dataclasses.replace(
            corpus,
            tests={**corpus.tests, "test_dir": everything},
            skipped=corpus.skipped + extra.skipped,
        )
    if config.development:
        corpus = development(corpus)
    if alphabet is None:
        units = config.units or corpus.units
        texts = [utterance.text for utterance in corpus.train]
        alphabet = Alphabet.letters() if units == "characters" else Alphabet.of_words(texts)
    front = LogMel(sample_rate=corpus.rate, bands=config.bands)
    stride = int(np.prod(config.dfsmn.strides))
    if config.model == "wav2letter":
        stride = config.wav2letter.stride
    framing = Framing(front, alphabet, stride)
    if config.cut_words and alphabet.units == "words":
        corpus = with_cut_words(corpus)
    corpus = fitting(corpus, framing)
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


def measure_statistics(
    utterances: Sequence[Utterance], framing: Framing, rate: int, most: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every band over (a sample of) the training data."""
    chosen = utterances[:: max(1, len(utterances) // most)]
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
