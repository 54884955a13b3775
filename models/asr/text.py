"""Transcripts as labels: a closed set of words, or the characters of Wav2letter.

Label 0 is CTC's blank in both.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

Units = Literal["words", "characters"]
BLANK = 0
LETTERS = (" ", "'", *"abcdefghijklmnopqrstuvwxyz")  # with the blank: Wav2letter's 29 outputs


@dataclasses.dataclass(frozen=True)
class Alphabet:
    """The labels of a model.

    Attributes:
      units: "words" (a label is a word) or "characters" (a label is a character, words are
        separated by one space).
      symbols: what labels 1, 2, ... stand for.
    Raises: ValueError for repeated or empty symbols.
    """

    units: Units
    symbols: tuple[str, ...]

    def __post_init__(self):
        if self.units not in ("words", "characters"):
            raise ValueError(f'Alphabet: units must be "words" or "characters", got {self.units!r}')
        if not self.symbols or len(set(self.symbols)) < len(self.symbols) or "" in self.symbols:
            raise ValueError(f"Alphabet: symbols must be different and not empty: {self.symbols}")

    @classmethod
    def letters(cls) -> "Alphabet":
        """Space, apostrophe and the 26 letters."""
        return cls("characters", LETTERS)

    @classmethod
    def of_words(cls, transcripts: Iterable[str]) -> "Alphabet":
        """Every word of some transcripts, in alphabetical order."""
        return cls("words", tuple(sorted({word for text in transcripts for word in text.split()})))

    @classmethod
    def of_characters(cls, transcripts: Iterable[str]) -> "Alphabet":
        """Every character of some transcripts, in the order of their code points."""
        return cls("characters", tuple(sorted(set("".join(transcripts)))))

    @property
    def size(self) -> int:
        """Labels, the blank among them."""
        return len(self.symbols) + 1

    def encode(self, text: str) -> list[int]:
        """Labels of a normalised transcript.

        Raises:
          ValueError: a word or character that is not a symbol; names it.
        """
        numbers = {symbol: 1 + i for i, symbol in enumerate(self.symbols)}
        pieces = text.split() if self.units == "words" else list(" ".join(text.split()))
        unknown = sorted({piece for piece in pieces if piece not in numbers})
        if unknown:
            raise ValueError(
                f"unknown {self.units} {', '.join(map(repr, unknown))} in {text!r}; known are "
                f"{', '.join(map(repr, self.symbols))}"
            )
        return [numbers[piece] for piece in pieces]

    def decode(self, labels: Sequence[int]) -> str:
        """The transcript of some labels; blanks are left out."""
        pieces = [self.symbols[label - 1] for label in labels if label != BLANK]
        return " ".join((" " if self.units == "words" else "").join(pieces).split())


def normalise(text: str) -> str:
    """Lower case; dashes and punctuation become spaces; curly apostrophes straight ones.

    Letters are composed (NFC): in files of some systems й is и and a breve. Of ASCII, what is read
    aloud (% & @ and the like) stays, so that its utterance is found to be misspelled.

    Example:

      >>> normalise("«Чай — это я», don’t!")
      "чай это я don't"
    """
    text = unicodedata.normalize("NFC", text.lower()).replace("\u2019", "'")
    text = re.sub(r"[-.,;:!?\"()\[\]]", " ", text)
    return " ".join("".join(_spoken(character) for character in text).split())


def _spoken(character: str) -> str:
    """A character; a space for punctuation outside ASCII, and nothing for what has no width."""
    if character.isascii():
        return character
    category = unicodedata.category(character)
    return " " if category.startswith("P") else "" if category == "Cf" else character
