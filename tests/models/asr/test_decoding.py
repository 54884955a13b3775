"""Beam search with an n-gram language model: against scores added up by hand."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.models.asr.ctc import collapse
from cmjax.models.asr.decoding import Decoding, make_decoder
from cmjax.models.asr.text import Alphabet

WORDS = Alphabet("words", ("no", "yes"))
SCORES = {"<s> yes": -0.1, "yes yes": -2.0, "yes no": -0.1, "no yes": -0.1}
ARPA = """\\data\\
ngram 1=5
ngram 2=4

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.3
-1.0\t</s>
-0.5\tyes\t-0.3
-0.5\tno\t-0.3

\\2-grams:
{}

\\end\\
""".format("\n".join(f"{score}\t{pair}" for pair, score in SCORES.items()))


@pytest.fixture
def model(tmp_path):
    pytest.importorskip("ctc_beam_decoder")
    path = tmp_path / "words.arpa"
    path.write_text(ARPA)
    return path


def _logits(frames=5, seed=0, labels=3):
    return np.random.default_rng(seed).normal(0, 1.5, (1, frames, labels)).astype(np.float32)


def _bigram(words: tuple[str, ...]) -> float:
    """ln of the probability of a sentence in the model, with its end."""
    total, before = 0.0, "<s>"
    for word in (*words, "</s>"):
        one = -1.0 if word == "</s>" else -0.5
        total += SCORES.get(f"{before} {word}", one - 0.3)
        before = word
    return total * math.log(10)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("weight", "bonus"), [(0.5, 1.5), (2.0, 0.0), (0.0, 0.0)])
def test_the_text_found_has_the_largest_score_of_all(model, seed, weight, bonus):
    logits = _logits(seed=seed)
    rows = np.asarray(logits[0] - np.logaddexp.reduce(logits[0], axis=-1, keepdims=True))
    totals: dict[tuple[str, ...], float] = {}
    for path in itertools.product(range(3), repeat=len(rows)):
        words = tuple(WORDS.symbols[label - 1] for label in collapse(path))
        p = sum(row[label] for row, label in zip(rows, path, strict=True))
        totals[words] = np.logaddexp(totals.get(words, -np.inf), p)
    scores = {w: p + weight * _bigram(w) + bonus * len(w) for w, p in totals.items() if w}
    options = Decoding(beam=500, language_model=model, language_weight=weight, word_bonus=bonus)
    (found,) = make_decoder(WORDS, options)(jnp.asarray(logits), jnp.array([5]))
    best = sorted(scores.values())[-1]
    # The library takes one best path of a prefix at a time, where ours sum over all of them.
    assert scores[tuple(found.split())] > best - 0.7


def test_a_language_model_decides_between_words_that_sound_alike(model):
    logits = np.log(np.array([[[0.1, 0.5, 0.4], [0.8, 0.1, 0.1], [0.1, 0.45, 0.45]]]))
    plain = make_decoder(WORDS, Decoding(beam=16))
    with_model = make_decoder(WORDS, Decoding(language_model=model, language_weight=2.0))
    given = jnp.asarray(logits, jnp.float32), jnp.array([3])
    assert plain(*given)[0].startswith("no")
    assert with_model(*given) == ["yes no"]


def test_characters_are_searched_by_words(tmp_path):
    pytest.importorskip("ctc_beam_decoder")
    path = tmp_path / "w.arpa"
    path.write_text(ARPA.replace("yes", "да").replace("no", "не"), encoding="utf-8")
    alphabet = Alphabet("characters", (" ", *"аден"))
    frames = [[1, 0, 0, 9, 0, 0], [1, 0, 6, 0, 0, 0], [1, 9, 0, 0, 0, 0], [1, 0, 0, 0, 0, 9]]
    frames += [[1, 0, 4, 0, 3.9, 0]]  # "на" rather than "не", by a little
    logits = jnp.asarray([frames], jnp.float32)
    greedy = make_decoder(alphabet, Decoding())(logits, jnp.array([5]))
    found = make_decoder(alphabet, Decoding(language_model=path))(logits, jnp.array([5]))
    assert greedy == ["да на"] and found == ["да не"]


@pytest.mark.parametrize("text", ["", "garbage", ARPA[:100], "\xff\xfe\x00"])
def test_a_broken_model_is_named(tmp_path, text):
    pytest.importorskip("ctc_beam_decoder")
    path = tmp_path / "b.arpa"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"--language-model .*b\.arpa cannot be read"):
        make_decoder(WORDS, Decoding(language_model=path))
