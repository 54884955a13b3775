"""Cutting words at pauses: where the cuts lie, when there are none, and what a corpus becomes."""

import numpy as np
import pytest

from train.data.audio import Utterance
from train.data.corpus import Corpus, development
from train.data.pauses import cut_at_pauses, with_cut_words

RATE = 8000


def _spoken(pieces: list[tuple[str, float]], hiss: float = 5.0, seed: int = 0) -> Utterance:
    """Noise bursts for words, hiss for pauses ("" is one), of so many seconds each."""
    random = np.random.default_rng(seed)
    waves = [
        random.normal(0, 3000 if word else hiss, round(seconds * RATE)) for word, seconds in pieces
    ]
    text = " ".join(word for word, _ in pieces if word)
    samples = np.clip(np.concatenate(waves), -32768, 32767).astype(np.int16)
    return Utterance("u", "ann", text, samples)


PAUSED = [("", 0.5), ("yes", 0.3), ("", 0.2), ("no", 0.4), ("", 0.3), ("no", 0.25), ("", 0.1)]


@pytest.mark.parametrize("hiss", [0.0, 5.0, 60.0])
def test_cuts_lie_in_the_middle_of_the_pauses(hiss):
    words = cut_at_pauses(_spoken(PAUSED, hiss), RATE)
    assert [word.text for word in words] == ["yes", "no", "no"]
    lengths = [len(word.samples) / RATE for word in words]
    # 0.2 s before the first word and half of each pause around it; the last pause lasts 0.1 s
    assert lengths == pytest.approx(
        [0.2 + 0.3 + 0.1, 0.1 + 0.4 + 0.15, 0.15 + 0.25 + 0.1], abs=0.03
    )
    whole = _spoken(PAUSED, hiss).samples
    joined = np.concatenate([word.samples for word in words])
    first = round(0.3 * RATE)
    inside = slice(RATE // 10, -RATE // 10)
    offset = next(
        k for k in range(first - 300, first + 300) if (whole[k : k + 4000] == joined[:4000]).all()
    )
    np.testing.assert_array_equal(whole[offset : offset + len(joined)][inside], joined[inside])


@pytest.mark.parametrize(
    "pieces",
    [
        [("yes", 0.3)],  # one word
        [("yes no", 0.6)],  # two, without a pause
        [("", 0.3), ("yes no", 0.3), ("", 0.3), ("no", 0.3), ("", 0.3), ("no", 0.3), ("no", 0.2)],
    ],
)
def test_without_a_pause_between_every_two_words_nothing_is_cut(pieces):
    assert cut_at_pauses(_spoken(pieces), RATE) == []


def test_a_silent_or_tiny_utterance_is_not_cut():
    silent = Utterance("u", "ann", "yes no", np.zeros(RATE, np.int16))
    assert cut_at_pauses(silent, RATE) == []
    assert cut_at_pauses(Utterance("u", "ann", "yes no", np.ones(40, np.int16)), RATE) == []


def test_a_corpus_gains_the_words_and_keeps_its_utterances_and_tests():
    paused, run_on = _spoken(PAUSED), _spoken([("yes no", 0.6)])
    corpus = Corpus((paused, run_on), {"test": (paused,)}, "words", RATE)
    richer = with_cut_words(corpus)
    assert richer.train[:2] == corpus.train and richer.tests == corpus.tests
    assert [word.name for word in richer.train[2:]] == ["u[0]", "u[1]", "u[2]"]
    assert richer.joinable
    assert not with_cut_words(Corpus((run_on,), {}, "words", RATE)).joinable


def test_development_holds_back_every_fifth_and_forgets_the_tests():
    takes = tuple(
        Utterance(f"{text}{i}", "ann", text, np.ones(100, np.int16))
        for text in ("one", "two")
        for i in range(10)
    )
    held = development(Corpus(takes, {"test": takes[:1]}, "words", RATE))
    assert set(held.tests) == {"development"} and len(held.tests["development"]) == 4
    assert {take.text for take in held.tests["development"]} == {"one", "two"}
    names = {take.name for take in held.train} | {take.name for take in held.tests["development"]}
    assert len(held.train) == 16 and names == {take.name for take in takes}
    with pytest.raises(ValueError, match="needs 5 training utterances, there are 4"):
        development(Corpus(takes[:4], {}, "words", RATE))
