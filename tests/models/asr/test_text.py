"""Labels and error rates."""

import pytest

from cmjax.models.asr.score import character_error_rate, word_error_rate
from cmjax.models.asr.text import Alphabet, normalise


def test_letters_are_the_29_labels_of_wav2letter():
    letters = Alphabet.letters()
    assert letters.size == 29
    assert letters.decode(letters.encode("it's a  test")) == "it's a test"


def test_words_are_labels_in_alphabetical_order():
    words = Alphabet.of_words(["two one", "three one"])
    assert words.symbols == ("one", "three", "two")
    assert words.encode("two one") == [3, 1]
    assert words.decode([0, 3, 0, 1]) == "two one"


@pytest.mark.parametrize(
    "alphabet, text, message",
    [
        (Alphabet.letters(), "caf\u00e9 9", r"unknown characters '9', '\u00e9'"),
        (Alphabet.of_words(["one"]), "one eleven", "unknown words 'eleven'"),
    ],
)
def test_unknown_symbols_are_named(alphabet, text, message):
    with pytest.raises(ValueError, match=message):
        alphabet.encode(text)


def test_normalise_keeps_apostrophes_and_drops_punctuation():
    said = ' Don\u2019t \u2014 "stop", well-known (I say)! '
    assert normalise(said) == "don't stop well known i say"


def test_error_rate_counts_each_kind_of_edit():
    found = word_error_rate(["one two three", "four"], ["one three three five", "four"])
    edits = (found.substitutions, found.deletions, found.insertions)
    assert sum(edits) == 2 and found.length == 4  # two -> three, and five inserted
    assert found.rate == 0.5 and found.exact == 0.5
    assert character_error_rate(["abcd"], ["abd"]).rate == 0.25
    assert word_error_rate(["one"], [""]).deletions == 1


@pytest.mark.parametrize("said, heard", [(["one"], []), ([" "], ["one"]), ([], [])])
def test_error_rates_need_words_and_equal_counts(said, heard):
    with pytest.raises(ValueError, match="word_error_rate"):
        word_error_rate(said, heard)
